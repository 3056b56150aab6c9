from __future__ import annotations

import dataclasses

import pytest

from slimtron_common.models.architecture import Architecture
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.recipes import quantization_recipe

LLAMA = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
GEMMA = dataclasses.replace(LLAMA, family="gemma")


@pytest.mark.parametrize(
    ("architecture", "recipe", "algorithm"),
    [
        (LLAMA, "w4a8_awq", "awq_lite"),
        (GEMMA, "w4a8_awq", {"method": "awq_lite", "alpha_step": 1}),
        (GEMMA, "int4_awq", {"method": "awq_lite", "alpha_step": 0.1}),
        # The 0.5 that Gemma 7B needs is where everybody starts.
        (GEMMA, "int8_sq", {"method": "smoothquant", "alpha": 0.5}),
    ],
)
def test_algorithm(architecture: Architecture, recipe: str, algorithm: object) -> None:
    config = quantization_recipe(QuantizationConfig(recipe), architecture)
    assert config.algorithm == algorithm


def test_sq_alpha_is_honoured_on_gemma() -> None:
    config = quantization_recipe(QuantizationConfig("int8_sq", sq_alpha=0.8), GEMMA)
    assert config.algorithm == {"method": "smoothquant", "alpha": 0.8}
