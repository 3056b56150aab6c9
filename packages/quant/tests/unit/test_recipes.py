from __future__ import annotations

import copy
import dataclasses
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import named_config, to_modelopt
from slimtron_common.models.architecture import Architecture
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.formats import FORMATS
from slimtron_quant.recipes import (
    RECIPES,
    excluded_modules,
    quantizable_modules,
    quantization_recipe,
    recipe_named,
    resolve_block_size,
)

# SmolLM2-135M's widths: 576 = 9 x 64 channels, 1536 in the feed-forward layer.
SMOLLM = Architecture(
    family="llama",
    num_layers=12,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
    tied_embeddings=True,
)
ROUND = dataclasses.replace(SMOLLM, hidden_size=384, ffn_hidden_size=768, num_attention_heads=6)


class Block(nn.Module):
    """Linear layers under Megatron-Core's names."""

    def __init__(self, a: Architecture, tp: int) -> None:
        super().__init__()
        self.self_attention = nn.Module()
        qkv = a.query_size + 2 * a.key_value_size
        self.self_attention.linear_qkv = nn.Linear(a.hidden_size, qkv // tp)
        self.self_attention.linear_proj = nn.Linear(a.query_size // tp, a.hidden_size)
        self.mlp = nn.Module()
        self.mlp.linear_fc1 = nn.Linear(a.hidden_size, 2 * a.ffn_hidden_size // tp)
        self.mlp.linear_fc2 = nn.Linear(a.ffn_hidden_size // tp, a.hidden_size)

    def linears(self) -> dict[str, nn.Linear]:
        return {n: m for n, m in self.named_modules() if isinstance(m, nn.Linear)}


class Stage(nn.Module):
    """One pipeline stage: its layers count from 0."""

    def __init__(self, a: Architecture, num_layers: int, tp: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Block(a, tp) for _ in range(num_layers))
        self.embedding = nn.Embedding(a.vocab_size, a.hidden_size)
        self.output_layer = nn.Linear(a.hidden_size, a.vocab_size)

    def forward(self) -> None:
        torch.manual_seed(1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module(torch.randn(4, module.in_features))


def quantized(
    config: QuantizationConfig, a: Architecture, num_layers: int, **kwargs: Any
) -> nn.Module:
    recipe = to_modelopt(quantization_recipe(config, a, **kwargs))
    stage = Stage(a, num_layers, kwargs.get("tensor_parallel_size", 1))
    model: nn.Module = mtq.quantize(stage, recipe, lambda m: m())
    return model


def enabled(model: nn.Module) -> set[str]:
    return {
        name.rsplit(".", 1)[0]
        for name, module in model.named_modules()
        if name.endswith("weight_quantizer") and module.is_enabled
    }


def test_registry() -> None:
    assert list(RECIPES) == ["fp8", "int8", "int8_sq", "int4", "int4_awq"]
    for name, recipe in RECIPES.items():
        assert recipe_named(name) is recipe
        assert recipe.name == name
        assert name.partition("_")[0] in FORMATS
        assert recipe.needs_calibration == mtq.need_calibration(
            getattr(mtq, recipe.modelopt_config)
        )
    with pytest.raises(ConfigError, match="fp8, int8"):
        recipe_named("fp16")


@pytest.mark.parametrize("name", RECIPES)
def test_quantizes_the_decoder_and_nothing_else(name: str) -> None:
    model = quantized(QuantizationConfig(name, "auto"), SMOLLM, num_layers=2)
    assert enabled(model) == {n for n in quantizable_modules(SMOLLM) if int(n.split(".")[2]) < 2}
    layer: Any = model.decoder.layers[0].mlp.linear_fc1  # type: ignore[union-attr,index]
    recipe = RECIPES[name]
    bits = {(4, 3): 8}.get(layer.weight_quantizer.num_bits, layer.weight_quantizer.num_bits)
    assert bits == recipe.weight_bits
    assert layer.input_quantizer.is_enabled == (recipe.activation_bits < 16)
    assert (layer.weight_quantizer.block_sizes or {}).get(-1) == (64 if recipe.has_blocks else None)
    assert hasattr(layer.input_quantizer, "_pre_quant_scale") == (name in ("int8_sq", "int4_awq"))


def test_recipes_leave_modelopts_configs_alone() -> None:
    names = [recipe.modelopt_config for recipe in RECIPES.values()]
    before = {name: copy.deepcopy(getattr(mtq, name)) for name in names}
    for name in RECIPES:
        config = QuantizationConfig(name, 16, 0.3, exclude=("decoder.layers.0",))
        to_modelopt(quantization_recipe(config, SMOLLM))
    assert {name: getattr(mtq, name) for name in names} == before


def test_sq_alpha_reaches_the_algorithm() -> None:
    def factor(alpha: float) -> torch.Tensor:
        model: Any = quantized(QuantizationConfig("int8_sq", sq_alpha=alpha), SMOLLM, num_layers=1)
        scale: torch.Tensor = model.decoder.layers[0].mlp.linear_fc2.input_quantizer.pre_quant_scale
        return scale

    assert quantization_recipe(QuantizationConfig("int8_sq", sq_alpha=0.3), SMOLLM).algorithm == {
        "method": "smoothquant",
        "alpha": 0.3,
    }
    stage: Any = Stage(SMOLLM, 1)
    weight_max = stage.decoder.layers[0].mlp.linear_fc2.weight.abs().amax(0)
    # With alpha 0 the activations keep their range: the factor is the weights' alone.
    torch.testing.assert_close(factor(0.0), weight_max)
    assert not torch.allclose(factor(0.5), factor(1.0))


@pytest.mark.parametrize(
    ("architecture", "tp", "auto"),
    [(SMOLLM, 1, 64), (SMOLLM, 3, 64), (ROUND, 1, 128), (ROUND, 3, 128), (ROUND, 6, 64)],
)
@pytest.mark.parametrize("name", ["int4", "int4_awq"])
def test_auto_takes_the_largest_block_that_divides_every_shard(
    name: str, architecture: Architecture, tp: int, auto: int
) -> None:
    def size(value: Any) -> int | None:
        return resolve_block_size(
            QuantizationConfig(name, value), architecture, tensor_parallel_size=tp
        )

    assert size("auto") == auto
    assert size(auto) == auto
    with pytest.raises(ConfigError) as error:
        size(auto * 2)
    assert error.value.where == "awq_block_size"


def test_misfit_names_the_layers_and_what_fits() -> None:
    with pytest.raises(ConfigError) as error:
        quantization_recipe(QuantizationConfig("int4"), SMOLLM)
    text = str(error.value)
    assert "self_attention.linear_qkv has 576" in text
    assert "linear_fc2" not in text
    assert "allowed: 64, 32, 16" in text
    with pytest.raises(ConfigError, match=r"of each of 8 processes: .*linear_fc2 has 192"):
        resolve_block_size(QuantizationConfig("int4"), SMOLLM, tensor_parallel_size=8)


def test_auto_where_nothing_fits() -> None:
    odd = dataclasses.replace(SMOLLM, hidden_size=500, ffn_hidden_size=1000)
    with pytest.raises(ConfigError, match="linear_fc2 has 1000") as error:
        resolve_block_size(QuantizationConfig("int4_awq", "auto"), odd)
    assert error.value.allowed == "no size fits this model"
    # An excluded layer needs no blocks: only linear_proj, 9 heads of 64, is left.
    only_proj = QuantizationConfig("int4", "auto", exclude=("*.mlp", "*.linear_qkv"))
    assert resolve_block_size(only_proj, odd) == 64


def test_block_size_is_for_recipes_with_blocks() -> None:
    for name in ("fp8", "int8", "int8_sq", None):
        assert resolve_block_size(QuantizationConfig(name, 7), SMOLLM) is None


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        ((), set()),
        (("*.linear_fc2",), {f"decoder.layers.{i}.mlp.linear_fc2" for i in range(12)}),
        (("decoder.layers.1",), {n for n in quantizable_modules(SMOLLM) if ".1." in n}),
        (("decoder.layers.1[01].mlp.*",),
         {f"decoder.layers.{i}.mlp.linear_fc{j}" for i in (10, 11) for j in (1, 2)}),
        (("decoder.layers.0.mlp.linear_fc1", "*.0.mlp.linear_fc2"),
         {f"decoder.layers.0.mlp.linear_fc{j}" for j in (1, 2)}),
    ],
)  # fmt: skip
def test_exclude(patterns: tuple[str, ...], excluded: set[str]) -> None:
    assert set(excluded_modules(patterns, SMOLLM)) == excluded
    model = quantized(QuantizationConfig("fp8", exclude=patterns), SMOLLM, num_layers=12)
    assert enabled(model) == set(quantizable_modules(SMOLLM)) - excluded


def test_exclude_counts_layers_over_all_pipeline_stages() -> None:
    config = QuantizationConfig("fp8", exclude=("decoder.layers.0", "decoder.layers.5.mlp"))
    first = quantized(config, SMOLLM, num_layers=4)
    assert {n for n in enabled(first) if n.startswith("decoder.layers.0.")} == set()
    assert len(enabled(first)) == 3 * 4
    second = quantized(config, SMOLLM, num_layers=4, layer_offset=4)
    local = {n for n in quantizable_modules(SMOLLM) if int(n.split(".")[2]) < 4}
    assert enabled(second) == local - {f"decoder.layers.1.mlp.linear_fc{j}" for j in (1, 2)}


@pytest.mark.parametrize(
    "pattern", ["*.linear_fc3", "model.layers.0", "decoder.layers.12", "*qkv_"]
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    config = QuantizationConfig("fp8", exclude=("*.linear_fc1", pattern))
    with pytest.raises(ConfigError) as error:
        quantization_recipe(config, SMOLLM)
    assert error.value.where == "exclude"
    assert error.value.found == pattern
    assert "decoder.layers." in str(error.value.allowed)


def test_excluding_everything_is_an_error() -> None:
    config = QuantizationConfig("fp8", exclude=("*.mlp", "*.linear_qkv", "*.linear_proj"))
    with pytest.raises(ConfigError, match="every layer is excluded"):
        quantization_recipe(config, SMOLLM)


def test_no_recipe_is_an_error() -> None:
    with pytest.raises(ConfigError, match="algorithm"):
        quantization_recipe(QuantizationConfig(None), SMOLLM)


def test_default_of_awq_block_size_is_modelopts() -> None:
    config = quantization_recipe(QuantizationConfig("int4_awq"), ROUND)
    start = named_config("INT4_AWQ_CFG")
    assert config.entries[: len(start.entries)] == start.entries
