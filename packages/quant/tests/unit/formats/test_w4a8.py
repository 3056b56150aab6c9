"""INT4 weights in FP8 against ModelOpt's two quantizers in sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modelopt.torch.export.quant_utils import (
    get_weight_scaling_factor,
    get_weight_scaling_factor_2,
    to_quantized_weight,
)
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn

from slimtron_common.errors import CheckpointError
from slimtron_quant.errors import CalibrationError
from slimtron_quant.formats import FORMATS, Calibration

OUT, IN, BLOCK = 48, 256, 64
FORMAT = FORMATS["w4a8_awq"]


def calibrated(weight: Tensor) -> SequentialQuantizer:
    quantizer = SequentialQuantizer(
        TensorQuantizer(
            QuantizerAttributeConfig(num_bits=4, block_sizes={-1: BLOCK, "type": "static"})
        ),
        TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), axis=None)),
    )
    for stage in quantizer:
        stage.disable_quant()
        stage.enable_calib()
    quantizer(weight)
    for stage in quantizer:
        stage.load_calib_amax()
        stage.disable_calib()
        stage.enable_quant()
    return quantizer


def random_weight(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    return (weight * torch.logspace(-2, 1, OUT)[:, None]).to(dtype)


def pack(weight: Tensor, quantizer: Any, **kwargs: Any) -> dict[str, Tensor]:
    arguments = {
        "weight_amax": quantizer[0]._amax,
        "tensor_amax": quantizer[1]._amax,
        "input_amax": torch.tensor(3.0),
        "block_size": BLOCK,
    }
    return FORMAT.pack(weight, Calibration(**{**arguments, **kwargs}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decodes_to_what_the_sequence_computes(dtype: torch.dtype) -> None:
    weight = random_weight(dtype)
    quantizer = calibrated(weight)
    tensors = pack(weight, quantizer)
    decoded = FORMAT.unpack(tensors, dtype=dtype, shape=weight.shape)
    expected = quantizer(weight).float()
    off = (decoded - expected).abs() > 2 * torch.finfo(dtype).eps * expected.abs()
    # What lies half-way between two E4M3 numbers may go to either.
    assert off.float().mean() < 0.005
    assert bool(((decoded - expected).abs() <= expected.abs() / 8 + 2.0**-17).all())
    again = pack(quantizer[0](weight), quantizer)
    assert torch.equal(again["weight"], tensors["weight"])


def test_tensors_are_those_of_modelopts_export() -> None:
    weight = random_weight(torch.float32)
    layer = nn.Module()
    layer.weight = nn.Parameter(weight)
    layer.weight_quantizer = calibrated(weight)
    layer.input_quantizer = TensorQuantizer(
        QuantizerAttributeConfig(num_bits=(4, 3), axis=None), amax=3.0
    )
    tensors = pack(weight, layer.weight_quantizer)
    scale, second = get_weight_scaling_factor(layer), get_weight_scaling_factor_2(layer)
    torch.testing.assert_close(tensors["weight_scale"], scale, rtol=2.4e-7, atol=0)
    torch.testing.assert_close(tensors["weight_scale_2"], second.squeeze(), rtol=2.4e-7, atol=0)
    expected = to_quantized_weight(weight, scale, "w4a8_awq", second, BLOCK)
    differ = (expected != tensors["weight"]).float().mean()
    assert expected.shape == tensors["weight"].shape
    assert differ < 1e-3
    assert FORMAT.bits_per_weight(tensors) == pytest.approx(4 + 32 / BLOCK + 64 / (OUT * IN))
    assert sum(FORMAT.stored_bits((OUT, IN), BLOCK).values()) == (
        FORMAT.bits_per_weight(tensors) * OUT * IN
    )


def test_activations_are_fp8() -> None:
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), axis=None), amax=2.0)
    scale = pack(random_weight(torch.float32), calibrated(random_weight(torch.float32)),
                 input_amax=torch.tensor(2.0))["input_scale"]  # fmt: skip
    assert torch.equal(FORMAT.quantize_activation(x, scale), quantizer(x))
    with pytest.raises(CheckpointError, match="input_scale"):
        FORMAT.quantize_activation(x, None)


@pytest.mark.parametrize("missing", ["tensor_amax", "input_amax"])
def test_refuses_missing_scales(missing: str) -> None:
    weight = random_weight(torch.float32)
    with pytest.raises(CalibrationError, match=missing.replace("_", " ")):
        pack(weight, calibrated(weight), **{missing: None})


def test_missing_tensors_are_named() -> None:
    weight = random_weight(torch.float32)
    tensors = pack(weight, calibrated(weight), input_factor=torch.ones(IN))
    for suffix in set(tensors) - {"pre_quant_scale"}:
        without = {key: value for key, value in tensors.items() if key != suffix}
        with pytest.raises(CheckpointError, match=suffix):
            FORMAT.unpack(without, dtype=torch.float32, shape=weight.shape)
