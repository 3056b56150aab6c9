"""Which Hugging Face tensors make up which Megatron-Core parameter, and how they are cut.

A ``Layout`` knows the two directions for one kind of parameter: ``merge`` cuts this
tensor-parallel process's shard out of whole Hugging Face tensors, ``split`` turns the shards
of all processes back into whole Hugging Face tensors. Both act on dimension 0 (output
channels) or the last (input channels) and leave the others alone, so quantization scales
travel by the same rules as the weights that they belong to.

Megatron-Core interleaves queries, keys and values by query group, and keeps the gate and the
up projection of one process next to each other:
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/attention.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from slimtron_common.models.architecture import Architecture
from slimtron_common.models.families import FAMILIES

__all__ = ["Layout", "Parameter", "layer_parameters", "model_parameters"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a parameter is cut over tensor-parallel processes; this one is not cut at all."""

    @property
    def dim(self) -> int | None:
        """The dimension that is cut: 0, -1, or None."""
        return None

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        """Returns the shard ``tp_rank`` of the parameter made of whole ``tensors``."""
        return tensors[0]

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the whole tensors that the shards of all processes make up."""
        return [shards[0]]


@dataclass(frozen=True, slots=True)
class OutputCut(Layout):
    """Cut along dimension 0 (output channels)."""

    @property
    def dim(self) -> int | None:
        return 0


@dataclass(frozen=True, slots=True)
class Column(OutputCut):
    """One tensor, cut along dimension 0."""

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return tensors[0].chunk(tp_size, 0)[tp_rank]

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), 0)]


@dataclass(frozen=True, slots=True)
class Row(Layout):
    """Cut along the last dimension (input channels)."""

    @property
    def dim(self) -> int | None:
        return -1

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return tensors[0].chunk(tp_size, -1)[tp_rank]

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), -1)]


@dataclass(frozen=True, slots=True)
class Vocabulary(OutputCut):
    """Cut along dimension 0 after padding with zeros to a multiple of the processes."""

    vocab_size: int

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        rows = -(-self.vocab_size // tp_size)
        shard = tensors[0][rows * tp_rank : rows * (tp_rank + 1)]
        padding = rows - shard.shape[0]
        return torch.cat([shard, shard.new_zeros(padding, *shard.shape[1:])]) if padding else shard

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), 0)[: self.vocab_size]]


@dataclass(frozen=True, slots=True)
class Gated(OutputCut):
    """Gate over up projection; each process holds its part of both."""

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return torch.cat([tensor.chunk(tp_size, 0)[tp_rank] for tensor in tensors], 0)

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        halves = [shard.chunk(2, 0) for shard in shards]
        return [torch.cat([half[i] for half in halves], 0) for i in range(2)]


@dataclass(frozen=True, slots=True)
class QueryKeyValue(OutputCut):
    """For each query group: its query heads, then its key head, then its value head."""

    num_query_groups: int
    queries_per_group: int
    head_dim: int

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        rest = tensors[0].shape[1:]
        grouped = torch.cat(
            [tensor.reshape(self.num_query_groups, -1, *rest) for tensor in tensors], 1
        )
        return grouped.chunk(tp_size, 0)[tp_rank].reshape(-1, *rest)

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        whole = torch.cat(list(shards), 0)
        rest = whole.shape[1:]
        sizes = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        grouped = whole.reshape(self.num_query_groups, sum(sizes), *rest)
        return [part.reshape(-1, *rest) for part in torch.split(grouped, sizes, 1)]


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
    a = architecture
    shapes, vocabulary = ((a.vocab_size, a.hidden_size),), Vocabulary(a.vocab_size)
    embedding = Parameter(
        ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), shapes, vocabulary
    )
    output = Parameter(("output_layer.weight",), ("lm_head.weight",), shapes, vocabulary)
    yield None, embedding
    for layer in range(a.num_layers):
        for parameter in layer_parameters(architecture, layer):
            yield layer, parameter
    for parameter in _norm(a, ("decoder.final_layernorm.",), "model.norm"):
        yield None, parameter
    if not a.tied_embeddings:
        yield None, output


def layer_parameters(architecture: Architecture, layer: int) -> Iterator[Parameter]:
    """Yields the parameters of one transformer layer, ``layer`` counted from 0."""
    a = architecture
    h, q, kv = a.hidden_size, a.query_size, a.key_value_size
    megatron, hf = "decoder.layers.{layer}", f"model.layers.{layer}"
    attention, mlp = f"{megatron}.self_attention", f"{megatron}.mlp"
    qkv = QueryKeyValue(a.num_query_groups, a.num_attention_heads // a.num_query_groups, a.head_dim)
    qkv_names = [f"{hf}.self_attn.{x}_proj" for x in "qkv"]

    yield from _norm(
        a,
        (f"{megatron}.input_layernorm.", f"{attention}.linear_qkv.layer_norm_"),
        f"{hf}.input_layernorm",
    )
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
                (f"{hf}.self_attn.{x}_norm.weight",),
                ((a.head_dim,),),
                Layout(),
            )
    yield Parameter(
        (f"{attention}.linear_proj.weight",),
        (f"{hf}.self_attn.o_proj.weight",),
        ((h, q),),
        Row(),
    )
    yield from _norm(
        a,
        (f"{megatron}.pre_mlp_layernorm.", f"{mlp}.linear_fc1.layer_norm_"),
        f"{hf}.post_attention_layernorm",
    )
    hf_mlp = f"{hf}.{FAMILIES[a.family].mlp}"
    if a.moe is None:
        yield from _feed_forward(a, mlp, hf_mlp)
        return
    yield Parameter(
        (f"{mlp}.router.weight",),
        (f"{hf_mlp}.gate.weight",),
        ((a.moe.num_experts, h),),
        Layout(),
    )
    for expert in range(a.moe.num_experts):
        yield from _feed_forward(
            a,
            f"{mlp}.experts.local_experts.{{expert}}",
            f"{hf_mlp}.experts.{expert}",
            expert,
        )
    if a.moe.shared_ffn_hidden_size is not None:
        shared = replace(a, ffn_hidden_size=a.moe.shared_ffn_hidden_size)
        yield from _feed_forward(shared, f"{mlp}.shared_experts", f"{hf_mlp}.shared_expert")
        yield Parameter(
            (f"{mlp}.shared_experts.gate_weight",),
            (f"{hf_mlp}.shared_expert_gate.weight",),
            ((1, h),),
            Layout(),
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
