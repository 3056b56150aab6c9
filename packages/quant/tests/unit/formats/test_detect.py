"""ModelOpt's own configs are told apart, before their first input and after it."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.testing.versions import needs
from slimtron_quant.formats import FORMATS
from slimtron_quant.formats.detect import LayerFormat, detect_format

NEWER = needs("nvidia-modelopt", "0.47", what="the config")

CONFIGS = {
    "FP8_DEFAULT_CFG": LayerFormat("fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": LayerFormat("fp8_pc_pt"),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": LayerFormat("block_fp8"),
    "INT8_DEFAULT_CFG": LayerFormat("int8"),
    "INT8_SMOOTHQUANT_CFG": LayerFormat("int8"),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": LayerFormat("int4", 128),
    "INT4_AWQ_CFG": LayerFormat("int4", 128),
    "W4A8_AWQ_BETA_CFG": LayerFormat("w4a8_awq", 128),
    "NVFP4_DEFAULT_CFG": LayerFormat("nvfp4"),
    "NVFP4_AWQ_LITE_CFG": LayerFormat("nvfp4"),
    "W4A16_NVFP4_CFG": LayerFormat("w4a16_nvfp4"),
    "MXFP4_DEFAULT_CFG": LayerFormat("mxfp4"),
    "MXFP8_DEFAULT_CFG": LayerFormat("mxfp8"),
}


def quantized(config: str) -> Any:
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    mtq.quantize(model, {**copy.deepcopy(getattr(mtq, config)), "algorithm": None})
    return model[0]


@pytest.mark.parametrize(
    "config",
    [pytest.param(name, marks=NEWER if name == "W4A16_NVFP4_CFG" else ()) for name in CONFIGS],
)
def test_tells_the_format(config: str) -> None:
    layer = quantized(config)
    assert detect_format(layer) == CONFIGS[config]
    if "FP4" in config or "MX" in config:
        return
    # Those that compute without a GPU change their attributes in the first call.
    mtq.calibrate(layer, "max", lambda module: module(torch.randn(2, 3, 256)))
    layer(torch.randn(2, 3, 256))
    assert detect_format(layer) == CONFIGS[config]


def test_every_format_has_a_config() -> None:
    assert {found.name for found in CONFIGS.values()} == set(FORMATS)


def test_a_factor_on_the_input_is_seen() -> None:
    layer = quantized("NVFP4_AWQ_LITE_CFG")
    layer.input_quantizer._enable_pre_quant_scale = True
    layer.input_quantizer.pre_quant_scale = torch.ones(256)
    assert detect_format(layer) == LayerFormat("nvfp4", has_input_factor=True)


def test_plain_and_switched_off_layers_have_none() -> None:
    assert detect_format(nn.Linear(2, 2)) is None
    layer = quantized("FP8_DEFAULT_CFG")
    layer.weight_quantizer.disable()
    assert detect_format(layer) is None


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("INT8_WEIGHT_ONLY_CFG", marks=NEWER),
        "MXFP6_DEFAULT_CFG",
        "MXINT8_DEFAULT_CFG",
        pytest.param("NVFP4_FOUR_OVER_SIX_CFG", marks=NEWER),
        "W4A8_MXFP4_FP8_CFG",
        "W4A8_NVFP4_FP8_CFG",
    ],
)
def test_what_cannot_be_written_is_refused(config: str) -> None:
    with pytest.raises(UnsupportedModelError, match="weights:"):
        detect_format(quantized(config))


def test_a_low_rank_part_is_refused() -> None:
    layer = quantized("NVFP4_DEFAULT_CFG")
    layer.weight_quantizer.svdquant_lora_a = torch.ones(2)
    with pytest.raises(UnsupportedModelError):
        detect_format(layer)
