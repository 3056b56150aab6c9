"""Codes against what ModelOpt's CUDA and Triton kernels compute."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from slimtron_quant.formats import FORMATS, Calibration
from slimtron_quant.formats.codes import block_amax
from slimtron_quant.formats.detect import detect_format, quantizer_stages

OUT, IN = 256, 512
CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "block_fp8": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a16_nvfp4": "W4A16_NVFP4_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def quantized(name: str, dtype: torch.dtype, inputs: Tensor, weight: Tensor) -> Any:
    layer = nn.Sequential(nn.Linear(IN, OUT, bias=False, device="cuda", dtype=dtype))
    layer[0].weight.data.copy_(weight)
    mtq.quantize(layer, {**copy.deepcopy(getattr(mtq, CONFIGS[name])), "algorithm": None})
    mtq.calibrate(layer, "max", lambda module: module(inputs))
    return layer[0]


def pack(name: str, weight: Tensor, layer: Any) -> dict[str, Tensor]:
    fmt, stages = FORMATS[name], list(quantizer_stages(layer.weight_quantizer))
    written = detect_format(layer)
    assert written is not None
    assert written.name == name
    height, width = fmt.block_shape(written.block_size)
    if fmt.takes_amax_from_weight:
        amax = block_amax(layer.weight, width)
    else:
        amax = stages[0]._amax
        if height == 128:
            amax = amax.reshape(OUT // 128, IN // 128).repeat_interleave(128, 0)
    inputs = layer.input_quantizer
    calibration = Calibration(
        weight_amax=amax,
        tensor_amax=stages[-1]._amax if fmt.has_two_levels else None,
        input_amax=getattr(inputs, "_amax", None) if inputs.is_enabled else None,
        block_size=written.block_size,
    )
    return fmt.pack(weight, calibration)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Share of values that are the same but for a rounding or two."""
    near = torch.isclose(
        found.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-30
    )
    return float(near.float().mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_are_those_of_the_kernels(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Above what ModelOpt's NVFP4 kernel takes for zero: block scales below 1e-5.
    weight = torch.randn(OUT, IN) * 0.02 * torch.logspace(-1, 1, OUT)[:, None]
    weight[3], weight[4, 64:128] = 0, 0
    inputs = (torch.randn(4, 8, IN) * torch.logspace(-2, 1, 4)[:, None, None]).cuda().to(dtype)
    inputs[1, 1, :64] = 0
    layer = quantized(name, dtype, inputs, weight)
    weight, fmt = layer.weight.detach(), FORMATS[name]
    rounded = next(quantizer_stages(layer.weight_quantizer))(weight).detach()
    expected = layer.weight_quantizer(weight).detach()

    direct, tensors = pack(name, weight, layer), pack(name, rounded, layer)
    decoded = fmt.unpack(tensors, dtype=dtype, shape=(OUT, IN))
    from_weight = fmt.unpack(direct, dtype=dtype, shape=(OUT, IN))
    shares = agree(decoded, expected, dtype), agree(from_weight, expected, dtype)
    rounds_inputs = layer.input_quantizer.is_enabled
    scale = tensors.get("input_scale")
    x = fmt.quantize_activation(inputs, scale)
    activations = agree(x, layer.input_quantizer(inputs), dtype) if rounds_inputs else 1.0
    print(f"\n{name:12s} {dtype!s:15s} {shares[0]:.6f} {shares[1]:.6f} {activations:.6f}")
    # A scale that lies half-way between two E4M3 numbers may go either way: kernels divide
    # approximately.
    # A float16 weight that was rounded once may lie half-way between two codes of a smaller scale.
    exact = not fmt.has_two_levels and dtype is not torch.float16
    assert shares[0] >= (1.0 if exact else 0.995)
    assert shares[1] >= 0.995
    assert activations >= 0.995
    assert bool(decoded.isfinite().all())
    assert bool((decoded[3] == 0).all())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_ties_and_edges_of_the_blocks(name: str) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.1, 5.9, 6.0])
    weight = torch.zeros(OUT, IN)
    weight[:, 0:10], weight[:, 10:20] = ties, -ties
    # The largest number exactly a power of two times the format's, and one step off it.
    powers = 2.0 ** torch.arange(-6, 7).repeat(20)[:OUT, None]
    weight[:, 32:64] = powers * (448 if name == "mxfp8" else 6)
    weight[::2, 32:64] *= 1 + 2**-7
    layer = quantized(name, torch.float32, torch.ones(2, IN, device="cuda"), weight)
    decoded = FORMATS[name].unpack(
        pack(name, layer.weight.detach(), layer), dtype=torch.float32, shape=(OUT, IN)
    )
    expected = layer.weight_quantizer(layer.weight).detach()
    assert torch.equal(decoded, expected)
