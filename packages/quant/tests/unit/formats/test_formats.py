"""Packing and unpacking against ModelOpt's quantizers and against float64 arithmetic."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.export.quant_utils import get_scaling_factor, to_quantized_weight
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

import slimtron_quant.formats as formats
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.testing.versions import needs
from slimtron_quant.errors import CalibrationError
from slimtron_quant.formats import FORMATS, Calibration, Format, format_named

OUT, IN, BLOCK = 128, 384, 64
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3), "axis": None},
    "fp8_pc_pt": {"num_bits": (4, 3), "axis": 0},
    "block_fp8": {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}},
    "int8": {"num_bits": 8, "axis": 0},
    "int4": {"num_bits": 4, "block_sizes": {-1: BLOCK, "type": "static"}},
}
BOUNDS = {"fp8": 448.0, "fp8_pc_pt": 448.0, "block_fp8": 448.0, "int8": 127.0, "int4": 7.0}
FLOATS = [name for name in ATTRIBUTES if "fp8" in name]
STATIC_INPUTS = ["fp8", "int8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    # Channels of very different size, as outliers make them.
    return (weight * torch.logspace(-1, 1, OUT)[:, None]).to(dtype)


def calibrated(name: str, weight: Tensor) -> TensorQuantizer:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**ATTRIBUTES[name]))
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    quantizer.disable_calib()
    quantizer.enable_quant()
    return quantizer


def pack(name: str, weight: Tensor, amax: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    if name in STATIC_INPUTS:
        kwargs.setdefault("input_amax", torch.tensor(3.0))
    if name == "block_fp8":
        # A scale is asked for by output channel, as gathered shards have it.
        amax = amax.reshape(OUT // 128, IN // 128).repeat_interleave(128, 0)
    kwargs.setdefault("block_size", BLOCK)
    return FORMATS[name].pack(weight, Calibration(weight_amax=amax, **kwargs))


def unpack(name: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return FORMATS[name].unpack(tensors, dtype=dtype, shape=(OUT, IN))


def codes(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The codes as float64 ``[out, in]``, by a second road than ``unpack``'s."""
    if name != "int4":
        return tensors["weight"].double()
    rows = []
    for byte_row in tensors["weight"].tolist():
        for shift in (0, 4):
            nibbles = [(byte >> shift) & 15 for byte in byte_row]
            rows.append([n - 16 if n > 7 else n for n in nibbles])
    return torch.tensor(rows, dtype=torch.float64)


def expanded(name: str, scale: Tensor) -> Tensor:
    scale = scale.double()
    if name == "int4":
        return scale.repeat_interleave(BLOCK, 1)
    if name == "block_fp8":
        return scale.reshape(OUT // 128, IN // 128).kron(torch.ones(128, 128))
    return scale.reshape(-1, 1).expand(OUT, IN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTRIBUTES)
class TestAgainstModelOpt:
    def test_codes_are_those_of_the_fake_quantized_weight(
        self, name: str, dtype: torch.dtype
    ) -> None:
        weight = random_weight(dtype)
        quantizer = calibrated(name, weight)
        tensors = pack(name, weight, quantizer._amax)
        scale = (quantizer.export_amax().double() / BOUNDS[name]).reshape(-1, 1)
        step = expanded(name, scale.reshape(OUT, -1) if name == "int4" else scale)
        fake = quantizer(weight.float()).double()
        # A code of an E4M3 float is a number on its grid, of an integer a whole number: fake
        # quantization in float32 leaves it within a few roundings.
        torch.testing.assert_close(codes(name, tensors), fake / step, rtol=1e-6, atol=1e-6)

    def test_decoded_weight_equals_the_fake_quantized_one(
        self, name: str, dtype: torch.dtype
    ) -> None:
        weight = random_weight(dtype)
        quantizer = calibrated(name, weight)
        decoded = unpack(name, pack(name, weight, quantizer._amax), dtype)
        fake = quantizer(weight).float()
        if name in FLOATS:
            # Both multiply the code by the same reciprocal.
            assert torch.equal(decoded, fake)
        else:
            # ModelOpt divides the code by a factor where a kernel multiplies it by a scale: one
            # float32 rounding more, which in 16 bits can turn a half-way case.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                decoded, fake, rtol=2 * eps, atol=float(torch.finfo(dtype).smallest_normal)
            )
            if dtype != torch.float32:
                assert (decoded == fake).float().mean() > 0.999

    def test_packing_the_fake_quantized_weight_gives_the_same_codes(
        self, name: str, dtype: torch.dtype
    ) -> None:
        weight = random_weight(dtype)
        quantizer = calibrated(name, weight)
        direct = pack(name, weight, quantizer._amax)
        again = pack(name, quantizer(weight), quantizer._amax)
        assert torch.equal(codes(name, again), codes(name, direct))

    def test_scales_are_modelopts(self, name: str, dtype: torch.dtype) -> None:
        weight = random_weight(dtype)
        quantizer = calibrated(name, weight)
        scale = pack(name, weight, quantizer._amax)["weight_scale"]
        expected = get_scaling_factor(quantizer)
        expected = expected if name == "block_fp8" else expected.squeeze()
        assert scale.dtype == torch.float32
        assert scale.shape == expected.shape
        # 1 / (bound / amax) against amax / bound: one rounding more.
        torch.testing.assert_close(scale, expected, rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_bytes_are_those_of_modelopts_export(name: str) -> None:
    # In float32 with a scale that is a power of two there is nothing to round differently.
    weight = random_weight(torch.float32)
    shape = {
        "fp8": (1,),
        "fp8_pc_pt": (OUT,),
        "block_fp8": (OUT // 128, 1, IN // 128, 1),
        "int8": (OUT,),
        "int4": (OUT, IN // BLOCK),
    }[name]
    scale = torch.full(shape, 2.0**-9)
    amax = scale * BOUNDS[name]
    tensors = pack(name, weight, amax)
    quantization = {"int8": "int8_sq", "int4": "int4_awq", "block_fp8": "fp8_pb_wo"}.get(name, name)
    # ModelOpt leaves FP8's saturation to the amax being the largest magnitude.
    limit = float(amax.max()) if name in FLOATS else float("inf")
    expected = to_quantized_weight(
        weight.clamp(-limit, limit), scale, quantization, block_size=128 if "p" in name else BLOCK
    )
    assert tensors["weight"].dtype == expected.dtype
    assert torch.equal(tensors["weight"].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_size_is_known_beforehand(name: str) -> None:
    weight = random_weight(torch.bfloat16)
    tensors = pack(name, weight, calibrated(name, weight)._amax)
    assert FORMATS[name].stored_bits((OUT, IN), BLOCK) == {
        suffix: tensor.numel() * tensor.element_size() * 8 for suffix, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_error_is_half_a_step_in_float64(name: str) -> None:
    weight = random_weight(torch.float32).double()
    tensors = pack(name, weight.float(), calibrated(name, weight.float())._amax)
    scale = expanded(name, tensors["weight_scale"])
    error = (codes(name, tensors) * scale - weight).abs()
    if name in FLOATS:
        # 3 mantissa bits: half a unit is 2^-4 of the number, or of the smallest normal 2^-6.
        allowed = torch.maximum(weight.abs(), 2.0**-6 * scale) * 2.0**-4
    else:
        allowed = scale / 2
    assert bool((error <= allowed * (1 + 1e-5)).all())
    # Integers are divided by the scale's reciprocal, which rounds once more.
    rtol = 0 if name in FLOATS else 2.0**-22
    expected = (codes(name, tensors) * scale).float()
    torch.testing.assert_close(unpack(name, tensors), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_zero_channels_decode_to_zero(name: str) -> None:
    weight = random_weight(torch.float32)
    weight[3:5] = 0
    amax = calibrated(name, weight)._amax
    tensors = pack(name, weight, amax)
    assert bool((tensors["weight_scale"] > 0).all())
    decoded = unpack(name, tensors)
    assert bool((decoded[3:5] == 0).all())
    assert bool((decoded[5:] != 0).any(1).all())
    nothing = pack(name, torch.zeros_like(weight), torch.zeros_like(amax))
    assert bool((unpack(name, nothing) == 0).all())


@needs("nvidia-modelopt", "0.47", what="scales for the tiniest weights")
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_tiny_weights_decode_as_modelopt_quantizes_them(name: str) -> None:
    weight = random_weight(torch.float32) * 2.0**-22
    quantizer = calibrated(name, weight)
    decoded = unpack(name, pack(name, weight, quantizer._amax))
    torch.testing.assert_close(decoded, quantizer(weight), rtol=2.4e-7, atol=0)
    assert bool((decoded == 0).any())


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_weights_beyond_amax_saturate(name: str) -> None:
    weight = random_weight(torch.float32)
    quantizer = calibrated(name, weight)
    quantizer._amax.mul_(0.5)
    decoded = unpack(name, pack(name, weight, quantizer._amax))
    torch.testing.assert_close(decoded, quantizer(weight), rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_refuses_meaningless_scales(name: str, bad: float) -> None:
    weight = random_weight(torch.float32)
    amax = calibrated(name, weight)._amax
    amax.view(-1)[0] = bad
    with pytest.raises(CalibrationError, match="weight amax"):
        pack(name, weight, amax)


@pytest.mark.parametrize("name", STATIC_INPUTS)
def test_refuses_an_uncalibrated_input(name: str) -> None:
    weight = random_weight(torch.float32)
    with pytest.raises(CalibrationError, match="input amax"):
        pack(name, weight, calibrated(name, weight)._amax, input_amax=None)
    with pytest.raises(CheckpointError, match="input_scale"):
        FORMATS[name].quantize_activation(weight, None)


def test_refuses_the_wrong_number_of_scales() -> None:
    with pytest.raises(CalibrationError, match="128 scales"):
        pack("int8", random_weight(torch.float32), torch.ones(127))


def test_int4_packs_whole_pairs_and_whole_blocks_only() -> None:
    with pytest.raises(CheckpointError, match="47 output channels"):
        pack("int4", torch.ones(47, IN), torch.ones(47, IN // BLOCK))
    with pytest.raises(CheckpointError, match="blocks of 256 on 384"):
        pack("int4", torch.ones(OUT, IN), torch.ones(OUT, 2), block_size=256)
    with pytest.raises(CheckpointError, match="47 output channels"):
        FORMATS["int4"].unpack({}, dtype=torch.float32, shape=(47, IN))
    with pytest.raises(CheckpointError, match="blocks of None"):
        pack("int4", torch.ones(OUT, IN), torch.ones(OUT, 2), block_size=None)


def test_pre_quant_scale_is_stored_where_the_layout_has_it() -> None:
    factor = torch.linspace(0.5, 2, IN).to(torch.bfloat16)
    weight = random_weight(torch.float32)
    for name in ("int8", "int4"):
        amax = calibrated(name, weight)._amax
        tensors = pack(name, weight, amax, input_factor=factor[None])
        assert torch.equal(tensors["pre_quant_scale"], factor)
        assert torch.equal(unpack(name, tensors), unpack(name, pack(name, weight, amax)))
        for damaged in (factor[1:], factor * 0):
            with pytest.raises(CheckpointError, match="pre_quant_scale"):
                unpack(name, {**tensors, "pre_quant_scale": damaged})
    for name, scales in (("fp8", 1), ("fp8_pc_pt", OUT), ("block_fp8", OUT * IN // 128**2)):
        with pytest.raises(CheckpointError, match="pre_quant_scale"):
            pack(name, weight, torch.ones(scales), input_factor=factor)


@pytest.mark.parametrize("name", ATTRIBUTES)
class TestDamagedTensors:
    def tensors(self, name: str) -> dict[str, Tensor]:
        weight = random_weight(torch.float32)
        return pack(name, weight, calibrated(name, weight)._amax)

    def test_missing(self, name: str) -> None:
        for suffix in self.tensors(name):
            damaged = self.tensors(name)
            del damaged[suffix]
            with pytest.raises(CheckpointError, match=suffix):
                unpack(name, damaged)

    def test_cut_short(self, name: str) -> None:
        for suffix, tensor in self.tensors(name).items():
            damaged = {**self.tensors(name), suffix: tensor.reshape(-1)[: tensor.numel() // 2]}
            with pytest.raises(CheckpointError, match=suffix):
                unpack(name, damaged)

    def test_other_type(self, name: str) -> None:
        for suffix, tensor in self.tensors(name).items():
            damaged = {**self.tensors(name), suffix: tensor.to(torch.float64)}
            with pytest.raises(CheckpointError, match=suffix):
                unpack(name, damaged)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_useless_scale(self, name: str, value: float) -> None:
        damaged = self.tensors(name)
        damaged["weight_scale"].view(-1)[-1] = value
        with pytest.raises(CheckpointError, match="weight_scale"):
            unpack(name, damaged)


def test_int4_refuses_blocks_that_do_not_divide() -> None:
    weight = random_weight(torch.float32)
    tensors = pack("int4", weight, calibrated("int4", weight)._amax)
    for blocks in (0, 5):
        with pytest.raises(CheckpointError, match=f"{blocks} blocks on 384"):
            unpack("int4", {**tensors, "weight_scale": torch.ones(OUT, blocks)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STATIC_INPUTS)
def test_activations_round_as_modelopts_quantizer(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = (torch.randn(64, IN) * 2).to(dtype)
    quantizer = TensorQuantizer(
        QuantizerAttributeConfig(**{**ATTRIBUTES[name], "axis": None}), amax=4.0
    )
    amax = torch.ones(1 if name == "fp8" else OUT)
    tensors = pack(name, torch.ones(OUT, IN), amax, input_amax=quantizer._amax)
    scale = tensors["input_scale"]
    rounded = FORMATS[name].quantize_activation(x, scale)
    assert rounded.dtype == dtype
    assert bool((x.abs() > 4).any())
    # Dividing by the scale is not multiplying by its inverse: values half-way between two codes
    # may go either way, all others agree.
    agree = torch.isclose(
        rounded.float(), quantizer(x).float(), rtol=2 * torch.finfo(dtype).eps, atol=0
    )
    assert agree.float().mean() > 0.99
    step = scale.double() * (1 if name == "int8" else 32)
    difference = rounded.double() - quantizer(x).double()
    assert difference.abs().max() <= step * (1 + torch.finfo(dtype).eps)
    # In float64: never further off than half a step, or the distance to the largest code.
    lowest = -128 * float(scale) if name == "int8" else -4.0
    exact = x.double().clamp(lowest, 4)
    half = step / 2 if name == "int8" else torch.maximum(exact.abs(), 2.0**-6 * scale) * 2.0**-4
    eps = torch.finfo(dtype).eps
    assert bool(((rounded.double() - exact).abs() <= half * (1 + 1e-5) + exact.abs() * eps).all())


@needs("nvidia-modelopt", "0.47", what="the same last bit of a token's scale")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_is_rounded_with_its_own_scale(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = (torch.randn(7, 3, IN) * torch.logspace(-4, 4, 7)[:, None, None]).to(dtype)
    x[2, 1] = 0
    x[3, 2] = 2.0**-25
    quantizer = TensorQuantizer(
        QuantizerAttributeConfig(num_bits=(4, 3), type="dynamic", block_sizes={-1: None})
    )
    rounded = FORMATS["fp8_pc_pt"].quantize_activation(x, None)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, quantizer(x))
    assert bool((rounded[2, 1] == 0).all())


@pytest.mark.parametrize("name", ["int4", "block_fp8"])
def test_weight_only_formats_leave_activations_alone(name: str) -> None:
    x = torch.randn(2, IN)
    assert FORMATS[name].quantize_activation(x, None) is x


def test_channels_calibrated_apart_make_no_block() -> None:
    amax = torch.ones(OUT, IN // 128)
    amax[77, 1] = 2
    with pytest.raises(CalibrationError, match="calibrated apart"):
        FORMATS["block_fp8"].pack(torch.ones(OUT, IN), Calibration(weight_amax=amax))


@pytest.mark.parametrize("shape", [(128, 576), (64, 128)])
def test_partial_blocks_are_refused(shape: tuple[int, int]) -> None:
    """ModelOpt writes them; vLLM and TensorRT-LLM do not read them."""
    calibration = Calibration(weight_amax=torch.ones(shape[0], -(-shape[1] // 128)))
    with pytest.raises(CheckpointError, match="blocks of 128"):
        FORMATS["block_fp8"].pack(torch.ones(shape), calibration)
    with pytest.raises(CheckpointError, match="blocks of 128"):
        FORMATS["block_fp8"].unpack({}, dtype=torch.float32, shape=shape)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp8", 8 + 64 / (OUT * IN)),
        ("fp8_pc_pt", 8 + 32 / IN),
        ("block_fp8", 8 + 32 / 128**2),
        ("int8", 8 + 32 / IN + 32 / (OUT * IN)),
        ("int4", 4 + 32 / BLOCK),
    ],
)
def test_bits_per_weight_count_the_scales(name: str, bits: float) -> None:
    weight = random_weight(torch.float32)
    tensors = pack(name, weight, calibrated(name, weight)._amax)
    assert FORMATS[name].bits_per_weight(tensors) == pytest.approx(bits)


def test_registry_and_unknown_format() -> None:
    assert all(isinstance(fmt, Format) and fmt.name == name for name, fmt in FORMATS.items())
    assert format_named("int8").quant_algo == "W8A8_SQ_PER_CHANNEL"
    with pytest.raises(ConfigError, match="fp3"):
        format_named("fp3")


def test_decoding_does_not_depend_on_modelopt() -> None:
    folder = Path(formats.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any("modelopt" in name for name in names), path
