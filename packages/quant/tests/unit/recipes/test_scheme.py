from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import named_config, to_modelopt
from slimtron_common.models.architecture import Architecture, MixtureOfExperts
from slimtron_common.testing.versions import needs
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.recipes import (
    RECIPES,
    Scheme,
    quantizable_modules,
    quantization_recipe,
    quantization_scheme,
)
from slimtron_quant.recipes.settings import linear_settings

NEWER = needs("nvidia-modelopt", "0.47", what="the config")

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


def block_size(config: QuantizationConfig, a: Architecture, tp: int = 1) -> int | None:
    scheme = quantization_scheme(config, a, tensor_parallel_size=tp)
    (size,) = {fmt.block_size for fmt in scheme.formats.values()}
    return size


def enabled(model: nn.Module) -> set[str]:
    return {
        name.rsplit(".", 1)[0]
        for name, module in model.named_modules()
        if name.endswith("weight_quantizer") and module.is_enabled
    }


ON_CPU = [name for name, recipe in RECIPES.items() if not recipe.needs_cuda]
OF_64 = [name for name in ON_CPU if name != "block_fp8"]
"""The blocks of block_fp8 divide neither SmolLM2's heads nor its width."""


@pytest.mark.parametrize("name", OF_64)
def test_quantizes_the_decoder_and_nothing_else(name: str) -> None:
    model = quantized(QuantizationConfig(name, "auto"), SMOLLM, num_layers=2)
    assert enabled(model) == {n for n in quantizable_modules(SMOLLM) if int(n.split(".")[2]) < 2}
    layer: Any = model.decoder.layers[0].mlp.linear_fc1  # type: ignore[union-attr,index]
    recipe = RECIPES[name]
    weight = layer.weight_quantizer
    first = weight[0] if isinstance(weight, nn.Sequential) else weight
    assert {(4, 3): 8}.get(first.num_bits, first.num_bits) == recipe.weight_bits
    assert layer.input_quantizer.is_enabled == (recipe.activation_bits < 16)
    assert (first.block_sizes or {}).get(-1) == (64 if recipe.has_blocks else None)
    assert hasattr(layer.input_quantizer, "_pre_quant_scale") == recipe.rewrites_weights


def test_recipes_leave_modelopts_configs_alone() -> None:
    names = [str(RECIPES[name].modelopt_config) for name in OF_64]
    before = {name: copy.deepcopy(getattr(mtq, name)) for name in names}
    for name in OF_64:
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
@pytest.mark.parametrize("name", ["int4", "int4_awq", "w4a8_awq"])
def test_auto_takes_the_largest_block_that_divides_every_shard(
    name: str, architecture: Architecture, tp: int, auto: int
) -> None:
    def size(value: Any) -> int | None:
        return block_size(QuantizationConfig(name, value), architecture, tp)

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
        block_size(QuantizationConfig("int4"), SMOLLM, 8)


def test_auto_where_nothing_fits() -> None:
    odd = dataclasses.replace(SMOLLM, hidden_size=500, ffn_hidden_size=1000)
    with pytest.raises(ConfigError, match="linear_fc2 has 1000") as error:
        block_size(QuantizationConfig("int4_awq", "auto"), odd)
    assert error.value.allowed == "no size fits this model"
    # An excluded layer needs no blocks: only linear_proj, 9 heads of 64, is left.
    only_proj = QuantizationConfig("int4", "auto", exclude=("*.mlp", "*.linear_qkv"))
    assert block_size(only_proj, odd) == 64


def test_block_size_is_for_recipes_with_blocks() -> None:
    for name in ("fp8", "int8", "int8_sq"):
        assert block_size(QuantizationConfig(name, 7), SMOLLM) is None


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


def scheme(name: str, a: Architecture = ROUND, **settings: Any) -> Scheme:
    return quantization_scheme(QuantizationConfig(name, **settings), a)


def test_include() -> None:
    model = quantized(
        QuantizationConfig("fp8", include=("decoder.layers.1.mlp", "*.linear_qkv")), SMOLLM, 2
    )
    assert enabled(model) == {
        "decoder.layers.0.self_attention.linear_qkv",
        "decoder.layers.1.self_attention.linear_qkv",
        "decoder.layers.1.mlp.linear_fc1",
        "decoder.layers.1.mlp.linear_fc2",
    }


PLAIN = [n for n, r in RECIPES.items() if not r.rewrites_weights]


@pytest.mark.parametrize("base", [n for n in PLAIN if n in OF_64])
@pytest.mark.parametrize("override", [n for n in PLAIN if n in OF_64])
def test_overrides_leave_no_trace_of_the_recipe_underneath(base: str, override: str) -> None:
    """The overridden layer is the one of a model that has the recipe throughout."""

    def fc2(**config: Any) -> Any:
        return (
            quantized(QuantizationConfig(awq_block_size=64, **config), SMOLLM, 1)
            .decoder.layers[  # type: ignore[union-attr,index]
                0
            ]
            .mlp.linear_fc2
        )

    mixed = fc2(algorithm=base, overrides={"*.linear_fc2": override})
    plain = fc2(algorithm=override)
    x = torch.randn(4, 1536)
    assert torch.equal(mixed(x), plain(x))
    assert repr(mixed.weight_quantizer) == repr(plain.weight_quantizer)
    assert repr(mixed.input_quantizer) == repr(plain.input_quantizer)


def test_overrides_count_layers_over_all_pipeline_stages() -> None:
    config = QuantizationConfig("fp8", overrides={"decoder.layers.5.mlp": "int8", "*.6": None})
    second = quantized(config, SMOLLM, num_layers=4, layer_offset=4)
    bits = {
        name.removesuffix(".weight_quantizer"): module.num_bits
        for name, module in second.named_modules()
        if name.endswith("weight_quantizer") and module.is_enabled
    }
    assert {name for name, found in bits.items() if found == 8} == {
        f"decoder.layers.1.mlp.linear_fc{j}" for j in (1, 2)
    }
    assert not any(name.startswith("decoder.layers.2.") for name in bits)


def test_a_stage_without_quantized_layers() -> None:
    found = scheme("fp8", SMOLLM, include=("decoder.layers.0",))
    for offset, count in ((0, 4), (4, 0)):
        config = found.modelopt_config(layer_offset=offset, num_layers=4)
        model: nn.Module = mtq.quantize(Stage(SMOLLM, 4), to_modelopt(config), lambda m: m())
        assert len(enabled(model)) == count


def test_what_overrides_need_is_needed() -> None:
    assert not scheme("int4").needs_calibration
    assert scheme("int4", overrides={"*.linear_fc2": "fp8"}).needs_calibration
    assert not scheme("fp8", overrides={"*": "int4"}).needs_calibration
    assert scheme("int4", overrides={"*.linear_fc2": "mxfp8"}).needs_cuda
    assert scheme("mxfp4").modelopt_config().algorithm is None
    mixed = scheme("mxfp4", overrides={"*.linear_fc2": "int4"})
    assert mixed.modelopt_config().algorithm == "max"
    assert not mixed.needs_calibration


def test_awq_leaves_overridden_layers_alone() -> None:
    config = QuantizationConfig("int4_awq", overrides={"decoder.layers.5.mlp": "fp8"})
    algorithm = quantization_recipe(config, ROUND, layer_offset=4).algorithm
    assert algorithm == {
        "method": "awq_lite",
        "alpha_step": 0.1,
        "skip": ("*decoder.layers.1.mlp.linear_fc1", "*decoder.layers.1.mlp.linear_fc2"),
    }


@pytest.mark.parametrize(
    ("base", "override", "said"),
    [
        ("fp8", "int4_awq", "searches, as awq_lite does"),
        ("int4_awq", "w4a8_awq", "searches, as awq_lite does"),
        ("fp8", "int8_sq", "searches, as smoothquant does"),
        ("int8_sq", "fp8", "block_fp8, int4, w4a16_nvfp4"),
        pytest.param(
            *("modelopt:NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "fp8", "mse calibrates the inputs"),
            marks=NEWER,
        ),
        ("fp8", "modelopt:NVFP4_AWQ_LITE_CFG", "searches"),
        ("fp8", "modelopt:NOTHING", "no such config"),
    ],
)
def test_recipes_that_cannot_stand_side_by_side(base: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        scheme(base, overrides={"*.linear_fc2": override})
    assert error.value.where == "overrides.*.linear_fc2"


def test_weight_only_recipes_stand_beside_smoothquant() -> None:
    found = scheme("int8_sq", overrides={"*.linear_fc2": "int4"})
    assert found.describe() == "36 to int8_sq, 12 to int4"


def test_blocks_divide_the_modules_of_their_own_recipe() -> None:
    # 128 divides 1536, not 576.
    only_fc2 = {"*.linear_fc2": "int4"}
    assert scheme("fp8", SMOLLM, overrides=only_fc2).describe() == "36 to fp8, 12 to int4"
    with pytest.raises(ConfigError, match="linear_fc1 has 576") as error:
        scheme("fp8", SMOLLM, overrides={"*.mlp": "int4"})
    assert error.value.where == "awq_block_size"
    sizes = scheme("int4", SMOLLM, awq_block_size="auto", overrides={"*.linear_fc2": "fp8"}).formats
    assert {fmt.block_size for fmt in sizes.values()} == {64, None}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("block_fp8", "linear_qkv: "),
        ("mxfp8", "linear_fc2: "),
        ("nvfp4", "linear_fc2: "),
    ],
)
def test_fixed_blocks_divide_the_layers(name: str, said: str) -> None:
    odd = dataclasses.replace(SMOLLM, ffn_hidden_size=1000)
    with pytest.raises(ConfigError, match="do not divide") as error:
        scheme(name, odd)
    assert error.value.where == "algorithm"
    assert said in str(error.value)
    assert name in str(error.value.found)


@pytest.mark.parametrize(
    "name",
    [
        "MXFP6_DEFAULT_CFG",
        pytest.param("INT8_WEIGHT_ONLY_CFG", marks=NEWER),
        "NVFP4_SVDQUANT_DEFAULT_CFG",
    ],
)
def test_what_no_format_holds_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no format on disk holds") as error:
        scheme(f"modelopt:{name}")
    assert error.value.where == "algorithm"


@NEWER
def test_a_config_that_names_no_layer() -> None:
    with pytest.raises(ConfigError, match="names no linear layer") as error:
        scheme("modelopt:NVFP4_EXPERTS_ONLY_CFG")
    assert error.value.where == "algorithm"


def test_a_config_of_modelopts_may_leave_layers_out() -> None:
    found = scheme("modelopt:NVFP4_MLP_ONLY_CFG")
    assert set(found.settings) == {n for n in quantizable_modules(ROUND) if ".mlp." in n}
    assert set(found.reasons.values()) == {"modelopt:NVFP4_MLP_ONLY_CFG leaves it out"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=NEWER if n == "w4a16_nvfp4" else (),
        )
        for n, r in RECIPES.items()
        if r.needs_cuda
    ],
)
def test_cuda_only_recipes_are_refused_on_the_cpu(name: str) -> None:
    found = scheme(name)
    found.check_device("cuda")
    with pytest.raises(ConfigError, match="CUDA GPU only") as error:
        found.check_device("cpu")
    assert error.value.where == "algorithm"
    assert error.value.found == f"{name} on cpu"
    assert error.value.allowed == ", ".join(ON_CPU)


def test_a_cuda_only_override_names_its_setting() -> None:
    with pytest.raises(ConfigError) as error:
        scheme("fp8", overrides={"*.linear_fc2": "mxfp4"}).check_device("cpu")
    assert error.value.where == "overrides"


def test_a_recipe_files_patterns_join_those_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        'recipe: int4\nblock_size: 32\nexclude: ["*.linear_qkv"]\n'
        'overrides: {"*.linear_fc2": fp8, "*.linear_fc1": fp8}\n'
    )
    found = scheme(
        str(path),
        awq_block_size=7,
        exclude=("decoder.layers.0",),
        overrides={"*.linear_fc1": "int8"},
    )
    layer = {
        name.rpartition(".")[2]: c.recipe for name, c in found.choices.items() if ".1." in name
    }
    assert layer == {
        "linear_qkv": None,
        "linear_proj": str(path),
        "linear_fc1": "int8",
        "linear_fc2": "fp8",
    }
    assert found.formats["decoder.layers.1.self_attention.linear_proj"].block_size == 32
    assert found.reasons["decoder.layers.0.mlp.linear_fc2"] == "excluded by decoder.layers.0"


def test_experts_go_together_where_they_are_treated_alike() -> None:
    moe = dataclasses.replace(
        ROUND,
        num_layers=2,
        moe=MixtureOfExperts(num_experts=4, experts_per_token=2),
    )
    found = scheme("fp8", moe, exclude=("decoder.layers.1.mlp.*.linear_fc2",))
    disabled = [e.pattern for e in found.modelopt_config().entries if "experts.*" in e.pattern]
    assert disabled == ["*decoder.layers.1.mlp.experts.*linear_fc2.*"]

    one = scheme("fp8", moe, overrides={"*.local_experts.3": "int8"})
    config = one.modelopt_config(experts=range(2, 4))
    bits = [
        linear_settings(config, f"decoder.layers.0.mlp.experts.local_experts.{i}.linear_fc1").inputs
        for i in (0, 1)
    ]
    assert [item[0]["num_bits"] for item in bits] == [(4, 3), 8]
    assert one.describe() == "16 to fp8, 4 to int8"
