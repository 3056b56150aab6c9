from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slimtron_common.errors import (
    MissingDependencyError,
    ParallelismError,
    UnsupportedModelError,
)
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import (
    architecture_of,
    build_model,
    transformer_engine_available,
)
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
}


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_tells_the_architecture_it_was_built_from(
    context: ParallelContext, name: str
) -> None:
    architecture = dataclasses.replace(LLAMA, **VARIANTS[name])
    dtype = getattr(torch, architecture.dtype)
    model = build_model(architecture, context, dtype=dtype)
    assert architecture_of(model) == architecture
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization", "LayerNorm"),
        ("gated_linear_unit", False),
        ("add_bias_linear", True),
        ("num_moe_experts", 8),
        ("layernorm_zero_centered_gamma", True),
        ("rotary_interleaved", True),
        ("activation_func", torch.nn.functional.gelu),
    ],
)
def test_what_the_family_lacks_is_named(context: ParallelContext, name: str, value: object) -> None:
    model: Any = build_model(LLAMA, context, dtype=torch.float32)
    setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=name):
        architecture_of(model)


def test_positions_that_are_not_rotary_are_named(context: ParallelContext) -> None:
    model: Any = build_model(LLAMA, context, dtype=torch.float32)
    model.position_embedding_type = "learned_absolute"
    with pytest.raises(UnsupportedModelError, match="learned_absolute"):
        architecture_of(model)


def test_a_layout_that_does_not_divide_is_refused(context: ParallelContext) -> None:
    three = dataclasses.replace(context, tp_size=3)
    with pytest.raises(ParallelismError, match="4 attention heads"):
        build_model(LLAMA, three, dtype=torch.float32)


@pytest.mark.skipif(transformer_engine_available(), reason="Transformer Engine is installed")
def test_absent_transformer_engine_is_named(context: ParallelContext) -> None:
    with pytest.raises(MissingDependencyError, match="Transformer Engine"):
        build_model(LLAMA, context, dtype=torch.float32, layer_spec="transformer_engine")
    with pytest.raises(ParallelismError, match="context parallelism"):
        build_model(LLAMA, dataclasses.replace(context, cp_size=2), dtype=torch.float32)


def test_building_says_nothing(context: ParallelContext, caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("megatron.core.models.gpt.gpt_model").level
    build_model(LLAMA, context, dtype=torch.float32)
    assert caplog.records == []
    assert logging.getLogger("megatron.core.models.gpt.gpt_model").level == level
