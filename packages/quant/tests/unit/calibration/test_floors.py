from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from torch import nn

from slimtron_quant.calibration.floors import floor_input_scales


def calibrated(name: str, activation: object, magnitude: float) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model.config = SimpleNamespace(activation_func=activation)
    x = magnitude * torch.randn(4, 128)
    model[1].weight.data *= magnitude
    return mtq.quantize(model, getattr(mtq, name), lambda m: m(x))


@pytest.mark.parametrize(
    ("name", "floor"), [("FP8_DEFAULT_CFG", 4.48), ("INT8_SMOOTHQUANT_CFG", 1.27)]
)
def test_squared_relu_has_a_floor(name: str, floor: float) -> None:
    model = calibrated(name, squared_relu, 1e-3)
    raised = floor_input_scales(model)
    assert [item.quantizer for item in raised] == ["0.input_quantizer", "1.input_quantizer"]
    for layer in model:
        assert float(layer.input_quantizer.amax) == pytest.approx(floor)
    assert "squared ReLU" in raised[0].reason
    assert floor_input_scales(model) == []


def test_large_scales_stay() -> None:
    model = calibrated("FP8_DEFAULT_CFG", squared_relu, 100.0)
    before = [layer.input_quantizer.amax.clone() for layer in model]
    assert floor_input_scales(model) == []
    assert [layer.input_quantizer.amax for layer in model] == before


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("FP8_DEFAULT_CFG", F.silu),
        ("INT8_DEFAULT_CFG", squared_relu),
        ("W4A8_AWQ_BETA_CFG", squared_relu),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", squared_relu),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", squared_relu),
    ],
)
def test_everything_else_has_none(name: str, activation: object) -> None:
    assert floor_input_scales(calibrated(name, activation, 1e-3)) == []
