from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import Hybrid, MixtureOfExperts
from slimtron_common.models.megatron import build_model
from slimtron_common.models.recognition import architecture_of
from slimtron_common.parallel import ParallelContext, initialize_parallel

LLAMA = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=301,
    max_position_embeddings=256,
    norm_epsilon=3e-6,
    rotary_base=5e5,
    dtype="float32",
)
MOE = MixtureOfExperts(num_experts=4, experts_per_token=2)
GEMMA = {
    "family": "gemma",
    "activation": "geglu",
    "normalization": "rmsnorm1p",
    "scaled_embeddings": True,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied_embeddings": True},
    "llama 3": {"rotary_scaling_factor": 32.0},
    "linear": {"rotary_interpolation": 4.0},
    "mistral": {"family": "mistral", "sliding_window": 8},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "fractional base": {"rotary_base": 12345.5},
    "bfloat16": {"dtype": "bfloat16"},
    "mixtral": {"family": "mixtral", "moe": MOE},
    "mixtral with a window": {"family": "mixtral", "moe": MOE, "sliding_window": 8},
    "qwen3_moe": {
        "family": "qwen3_moe",
        "qk_norm": True,
        "moe": dataclasses.replace(MOE, normalized=False),
    },
    "qwen2_moe": {
        "family": "qwen2_moe",
        "qkv_bias": True,
        "moe": dataclasses.replace(MOE, normalized=False, shared_ffn_hidden_size=48),
    },
    "gemma": GEMMA,
    "nemotron": {
        "family": "nemotron",
        "activation": "squared_relu",
        "normalization": "layernorm1p",
        "rotary_fraction": 0.25,
    },
    "nemotron_h": {
        "family": "nemotron_h",
        "activation": "squared_relu",
        "rotary_base": 10000.0,
        "hybrid": Hybrid(
            pattern="M*",
            mamba_num_heads=4,
            mamba_head_dim=8,
            mamba_num_groups=2,
            mamba_state_dim=16,
        ),
    },
    "nemotron with Llama 3's scaling": {
        "family": "nemotron",
        "activation": "squared_relu",
        "normalization": "layernorm1p",
        "rotary_fraction": 0.5,
        "rotary_scaling_factor": 8.0,
    },
}


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def build(context: ParallelContext, name: str = "llama") -> Any:
    architecture = dataclasses.replace(LLAMA, **VARIANTS[name])
    return build_model(architecture, context, dtype=getattr(torch, architecture.dtype))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_tells_the_architecture_it_was_built_from(
    context: ParallelContext, name: str
) -> None:
    architecture = dataclasses.replace(LLAMA, **VARIANTS[name])
    model = build(context, name)
    assert architecture_of(model) == architecture
    dtypes = {n: p.dtype for n, p in model.named_parameters() if not n.endswith(("A_log", "D"))}
    assert set(dtypes.values()) == {getattr(torch, architecture.dtype)}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [
        ("llama", "normalization", "LayerNorm"),
        ("llama", "gated_linear_unit", False),
        ("llama", "add_bias_linear", True),
        ("llama", "layernorm_zero_centered_gamma", True),
        ("llama", "rotary_interleaved", True),
        ("llama", "activation_func", torch.nn.functional.gelu),
        ("qwen3", "add_qkv_bias", True),
        ("gemma", "window_size", (7, 0)),
        ("qwen2_moe", "moe_shared_expert_intermediate_size", None),
        ("qwen2_moe", "moe_shared_expert_gate", False),
        ("mixtral", "moe_router_score_function", "sigmoid"),
        ("mixtral", "moe_layer_freq", [0, 1]),
        ("mixtral", "moe_grouped_gemm", True),
    ],
)
def test_what_no_family_has_is_named(
    context: ParallelContext, variant: str, name: str, value: object
) -> None:
    model = build(context, variant)
    setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=name):
        architecture_of(model)


def test_mixtral_without_normalized_weights_is_none(context: ParallelContext) -> None:
    model = build(context, "mixtral")
    model.config.moe_router_pre_softmax = True
    with pytest.raises(UnsupportedModelError, match="num_moe_experts 4"):
        architecture_of(model)


def test_layers_of_another_kind_are_named(context: ParallelContext) -> None:
    model = build(context, "nemotron_h")
    model.hybrid_layer_pattern = "ME"
    with pytest.raises(UnsupportedModelError, match="not those of a supported hybrid") as caught:
        architecture_of(model)
    assert caught.value.found == "ME"


def test_positions_that_are_not_rotary_are_named(context: ParallelContext) -> None:
    model = build(context)
    model.position_embedding_type = "learned_absolute"
    with pytest.raises(UnsupportedModelError, match="learned_absolute"):
        architecture_of(model)


def test_embeddings_that_are_not_scaled_are_named(context: ParallelContext) -> None:
    model = build(context, "gemma")
    model.embedding._forward_hooks.clear()
    with pytest.raises(UnsupportedModelError, match="scaled embeddings False"):
        architecture_of(model)
    # As NeMo scales them.
    mixin = type("EmbeddingScalingMixin", (), {})
    model.embedding.__class__ = type("Scaled", (mixin, type(model.embedding)), {})
    assert architecture_of(model).family == "gemma"
    # A later pipeline stage has none.
    del model.embedding
    assert architecture_of(model).scaled_embeddings


def test_megatron_cores_own_functions_are_known(context: ParallelContext) -> None:
    from megatron.core.activations import fast_gelu, squared_relu

    for variant, function in (("gemma", fast_gelu), ("nemotron", squared_relu)):
        model = build(context, variant)
        model.config.activation_func = function
        assert architecture_of(model).family == variant
