"""Which Hugging Face tensors make up which Megatron-Core parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slimtron_common.models.architecture import Architecture, Hybrid
from slimtron_common.models.families import FAMILIES
from slimtron_common.models.layouts import (
    Column,
    Gated,
    Layout,
    Packed,
    QueryKeyValue,
    Row,
    Vocabulary,
)

__all__ = ["Parameter", "layer_parameters", "model_parameters"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron-Core parameter and the Hugging Face tensors that it is made of."""

    names: tuple[str, ...]
    """Possible names in the Megatron-Core model: the local layer spec's, then Transformer
    Engine's, whose linear layers hold the norm before them."""

    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    expert: int | None = None
    """The expert that it belongs to, counted from 0 over all processes."""


def model_parameters(architecture: Architecture) -> Iterator[tuple[int | None, Parameter]]:
    """Yields every parameter of the whole model with its layer (from 0; None outside layers).

    Megatron-Core numbers the layers of a pipeline stage and the experts of a process from 0: the
    names hold the fields ``{layer}`` and ``{expert}`` for the local numbers.
    """
    a, family = architecture, FAMILIES[architecture.family]
    shapes, vocabulary = ((a.vocab_size, a.hidden_size),), Vocabulary(a.vocab_size)
    embedding = Parameter(
        ("embedding.word_embeddings.weight",), (f"{family.embedding}.weight",), shapes, vocabulary
    )
    output = Parameter(("output_layer.weight",), ("lm_head.weight",), shapes, vocabulary)
    yield None, embedding
    for layer in range(a.num_layers):
        for parameter in layer_parameters(architecture, layer):
            yield layer, parameter
    # The second is its name in a hybrid.
    final = ("decoder.final_layernorm.", "decoder.final_norm.")
    for parameter in _norm(a, final, family.final_norm):
        yield None, parameter
    if not a.tied_embeddings:
        yield None, output


def layer_parameters(architecture: Architecture, layer: int) -> Iterator[Parameter]:
    """Yields the parameters of one layer, ``layer`` counted from 0."""
    megatron = "decoder.layers.{layer}"
    hf = f"{FAMILIES[architecture.family].layers}.{layer}"
    if architecture.hybrid is not None:
        yield from _hybrid_layer(architecture, architecture.hybrid, layer, megatron, hf)
        return
    norms = [f"{hf}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    yield from _attention(architecture, megatron, norms[0], f"{hf}.self_attn")
    yield from _mlp(architecture, megatron, norms[1], f"{hf}.{FAMILIES[architecture.family].mlp}")


def _attention(
    architecture: Architecture, megatron: str, hf_norm: str, hf: str
) -> Iterator[Parameter]:
    """A norm and the attention after it."""
    a = architecture
    h, q, kv = a.hidden_size, a.query_size, a.key_value_size
    attention = f"{megatron}.self_attention"
    qkv = QueryKeyValue(a.num_query_groups, a.num_attention_heads // a.num_query_groups, a.head_dim)
    qkv_names = [f"{hf}.{x}_proj" for x in "qkv"]
    norms = (f"{megatron}.input_layernorm.", f"{attention}.linear_qkv.layer_norm_")
    yield from _norm(a, norms, hf_norm)
    yield Parameter(
        (f"{attention}.linear_qkv.weight",),
        tuple(f"{name}.weight" for name in qkv_names),
        ((q, h), (kv, h), (kv, h)),
        qkv,
    )
    if a.qkv_bias:
        yield Parameter(
            (f"{attention}.linear_qkv.bias",),
            tuple(f"{name}.bias" for name in qkv_names),
            ((q,), (kv,), (kv,)),
            qkv,
        )
    if a.qk_norm:
        for x in "qk":
            yield Parameter(
                (f"{attention}.{x}_layernorm.weight",),
                (f"{hf}.{x}_norm.weight",),
                ((a.head_dim,),),
                Layout(),
            )
    yield Parameter(
        (f"{attention}.linear_proj.weight",), (f"{hf}.o_proj.weight",), ((h, q),), Row()
    )


def _mlp(architecture: Architecture, megatron: str, hf_norm: str, hf: str) -> Iterator[Parameter]:
    """A norm and the feed-forward network or the experts after it."""
    a = architecture
    mlp = f"{megatron}.mlp"
    norms = (f"{megatron}.pre_mlp_layernorm.", f"{mlp}.linear_fc1.layer_norm_")
    yield from _norm(a, norms, hf_norm)
    if a.moe is None:
        yield from _feed_forward(a, mlp, hf)
        return
    yield Parameter(
        (f"{mlp}.router.weight",),
        (f"{hf}.gate.weight",),
        ((a.moe.num_experts, a.hidden_size),),
        Layout(),
    )
    for expert in range(a.moe.num_experts):
        yield from _feed_forward(
            a,
            f"{mlp}.experts.local_experts.{{expert}}",
            f"{hf}.experts.{expert}",
            expert,
        )
    if a.moe.shared_ffn_hidden_size is not None:
        shared = replace(a, ffn_hidden_size=a.moe.shared_ffn_hidden_size)
        yield from _feed_forward(shared, f"{mlp}.shared_experts", f"{hf}.shared_expert")
        yield Parameter(
            (f"{mlp}.shared_experts.gate_weight",),
            (f"{hf}.shared_expert_gate.weight",),
            ((1, a.hidden_size),),
            Layout(),
        )


def _hybrid_layer(
    architecture: Architecture, hybrid: Hybrid, layer: int, megatron: str, hf: str
) -> Iterator[Parameter]:
    """A norm and what the pattern has at this place."""
    norm, mixer = f"{hf}.norm", f"{hf}.mixer"
    kind = hybrid.pattern[layer]
    if kind == "*":
        yield from _attention(architecture, megatron, norm, mixer)
    elif kind == "-":
        yield from _mlp(architecture, megatron, norm, mixer)
    else:
        norms = (f"{megatron}.norm.", f"{megatron}.mixer.in_proj.layer_norm_")
        yield from _norm(architecture, norms, norm)
        yield from _mamba(architecture.hidden_size, hybrid, f"{megatron}.mixer", mixer)


def _mamba(hidden_size: int, hybrid: Hybrid, megatron: str, hf: str) -> Iterator[Parameter]:
    heads, inner, states = hybrid.mamba_num_heads, hybrid.inner_size, hybrid.states_size
    # What the convolution sees, and around it the gate and the time steps.
    convolved = (inner, states, states)
    projected = (inner, *convolved, heads)
    yield Parameter(
        (f"{megatron}.in_proj.weight",),
        (f"{hf}.in_proj.weight",),
        ((sum(projected), hidden_size),),
        Packed(projected),
    )
    for kind, shape in (("weight", (1, hybrid.conv_kernel)), ("bias", ())):
        yield Parameter(
            # The second is its name since Megatron-Core 0.19.
            (f"{megatron}.conv1d.{kind}", f"{megatron}.conv1d_{kind}"),
            (f"{hf}.conv1d.{kind}",),
            ((sum(convolved), *shape),),
            Packed(convolved),
        )
    for name in ("A_log", "D", "dt_bias"):
        yield Parameter((f"{megatron}.{name}",), (f"{hf}.{name}",), ((heads,),), Column())
    yield Parameter((f"{megatron}.norm.weight",), (f"{hf}.norm.weight",), ((inner,),), Column())
    yield Parameter(
        (f"{megatron}.out_proj.weight",), (f"{hf}.out_proj.weight",), ((hidden_size, inner),), Row()
    )


def _norm(architecture: Architecture, prefixes: tuple[str, ...], hf: str) -> Iterator[Parameter]:
    kinds = ["weight", "bias"] if architecture.normalization == "layernorm1p" else ["weight"]
    for kind in kinds:
        yield Parameter(
            tuple(f"{prefix}{kind}" for prefix in prefixes),
            (f"{hf}.{kind}",),
            ((architecture.hidden_size,),),
            Layout(),
        )


def _feed_forward(
    architecture: Architecture, megatron: str, hf: str, expert: int | None = None
) -> Iterator[Parameter]:
    family = FAMILIES[architecture.family]
    h, f = architecture.hidden_size, architecture.ffn_hidden_size
    yield Parameter(
        (f"{megatron}.linear_fc1.weight",),
        tuple(f"{hf}.{name}.weight" for name in family.up),
        ((f, h),) * len(family.up),
        Gated() if architecture.gated else Column(),
        expert,
    )
    yield Parameter(
        (f"{megatron}.linear_fc2.weight",),
        (f"{hf}.{family.down}.weight",),
        ((h, f),),
        Row(),
        expert,
    )
