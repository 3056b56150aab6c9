from __future__ import annotations

import json

import pytest
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import process_layer_quant_config

from slimtron_common.errors import ConfigError
from slimtron_common.testing.versions import needs
from slimtron_quant.formats import FORMATS, format_named
from slimtron_quant.formats.detect import LayerFormat
from slimtron_quant.formats.hf_quant_config import config_json_quantization, hf_quant_config

NEWER = needs("nvidia-modelopt", "0.47", what="the format")

Spec = LayerFormat | None
FP8, INT4 = LayerFormat("fp8"), LayerFormat("int4", 64)


def layers(quantized: Spec, others: dict[str, Spec] | None = None) -> dict[str, Spec]:
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(12) for p in ("up", "gate", "down")]
    return {**dict.fromkeys(names, quantized), "lm_head": None, **(others or {})}


@pytest.mark.parametrize(
    ("spec", "modelopt_format"),
    [
        (FP8, "fp8"),
        (LayerFormat("fp8_pc_pt"), "fp8_pc_pt"),
        (LayerFormat("block_fp8"), "fp8_pb_wo"),
        (LayerFormat("int8"), "int8_sq"),
        (INT4, "int4_awq"),
        (LayerFormat("w4a8_awq", 64, has_input_factor=True), "w4a8_awq"),
        (LayerFormat("nvfp4"), "nvfp4"),
        (LayerFormat("nvfp4", has_input_factor=True), "nvfp4_awq"),
        pytest.param(
            LayerFormat("w4a16_nvfp4"),
            "w4a16_nvfp4",
            marks=NEWER,
        ),
        (LayerFormat("mxfp4"), "mxfp4"),
        pytest.param(LayerFormat("mxfp8"), "mxfp8", marks=NEWER),
    ],
)
def test_says_what_modelopt_says(spec: Spec, modelopt_format: str) -> None:
    assert spec is not None
    # ModelOpt wants the weights' names with two keys a layer.
    given: dict[str, object] = {"lm_head.quantization": None}
    for name in layers(None):
        if name != "lm_head":
            given[f"{name}.quantization"] = modelopt_format
            blocks = format_named(spec.name).block_shape(spec.block_size)[1]
            given[f"{name}.awq_block_size"] = blocks or 0
    expected = process_layer_quant_config(given)
    written = hf_quant_config(layers(spec))
    assert written["producer"]["name"] == "modelopt"
    assert written["quantization"] == expected
    assert written["quantization"]["exclude_modules"] == ["lm_head"]


@pytest.mark.parametrize("spec", [LayerFormat(name, 32) for name in FORMATS])
def test_both_files_agree(spec: Spec) -> None:
    given = layers(spec)
    file, config = hf_quant_config(given), config_json_quantization(given)
    converted = convert_hf_quant_config_format(file)
    # ModelOpt's own conversion drops the settings of integer formats; nothing it says is changed.
    assert {key: config[key] for key in converted} == converted
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    for key in set(file["quantization"]) - {"kv_cache_quant_algo", "exclude_modules"}:
        assert config[key] == file["quantization"][key]
    assert config["ignore"] == file["quantization"]["exclude_modules"]
    assert "quantized_layers" not in config


def test_mixed_formats_are_listed_layer_by_layer() -> None:
    given = layers(FP8, {"model.layers.0.self_attn.o_proj": INT4, "lm_head": None})
    file, config = hf_quant_config(given), config_json_quantization(given)
    quantization = file["quantization"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    assert len(quantization["quantized_layers"]) == 37
    assert quantization["quantized_layers"]["model.layers.0.self_attn.o_proj"] == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
    assert quantization["exclude_modules"] == ["lm_head"]
    converted = convert_hf_quant_config_format(file)
    assert {key: config[key] for key in converted} == converted


def test_one_layer_with_a_factor_names_the_whole_model() -> None:
    given = layers(
        LayerFormat("nvfp4"),
        {"model.layers.0.self_attn.o_proj": LayerFormat("nvfp4", has_input_factor=True)},
    )
    quantization = hf_quant_config(given)["quantization"]
    assert quantization["quant_algo"] == "NVFP4_AWQ"
    assert "quantized_layers" not in quantization
    assert len(config_json_quantization(given)["config_groups"]) == 1


def test_excluded_layers_are_named_in_full() -> None:
    given = layers(FP8, {f"model.layers.1.self_attn.{p}_proj": None for p in "qkv"})
    assert hf_quant_config(given)["quantization"]["exclude_modules"] == [
        "lm_head",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_json_able_and_deterministic() -> None:
    given = layers(INT4)
    for function in (hf_quant_config, config_json_quantization):
        assert json.dumps(function(given)) == json.dumps(function(dict(given)))


def test_nothing_quantized_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing is quantized"):
        hf_quant_config(layers(None))
