"""Scales that are stored and read back multiply as they did."""

from __future__ import annotations

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from slimtron_quant.export.settle import settle_scales
from slimtron_quant.formats import Calibration, format_named


@pytest.mark.parametrize(
    ("config", "fmt"), [("FP8_DEFAULT_CFG", "fp8"), ("INT8_DEFAULT_CFG", "int8")]
)
def test_what_is_read_rounds_as_what_was_calibrated(config: str, fmt: str) -> None:
    """Of hundreds of scales some would be read as their neighbours."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(64)))
    x = torch.randn(8, 32)
    mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), lambda m: [layer(x) for layer in m])

    before = [layer.input_quantizer._amax * (1 + i / 64) for i, layer in enumerate(model)]
    for layer, amax in zip(model, before, strict=True):
        layer.input_quantizer._amax.copy_(amax)
    settle_scales(model)
    changed = 0
    for layer, amax in zip(model, before, strict=True):
        settled = layer.input_quantizer._amax
        assert amax <= settled <= amax * 1.0001
        changed += int(settled != amax)
        tensors = format_named(fmt).pack(
            layer.weight_quantizer(layer.weight).detach(),
            Calibration(weight_amax=layer.weight_quantizer._amax, input_amax=settled),
        )
        unpacked = format_named(fmt).unpack(tensors, dtype=torch.float32, shape=(32, 32))
        assert torch.equal(unpacked, layer.weight_quantizer(layer.weight))
        rounded = format_named(fmt).quantize_activation(x, tensors["input_scale"])
        assert torch.equal(rounded, layer.input_quantizer(x))
    assert 0 < changed < len(before) / 2
    again = [layer.input_quantizer._amax.clone() for layer in model]
    settle_scales(model)
    assert all(
        torch.equal(a, layer.input_quantizer._amax) for a, layer in zip(again, model, strict=True)
    )
