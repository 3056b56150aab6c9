"""NVFP4 and Microscaling against float64 arithmetic, ModelOpt's packing and compressed-tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_common.testing.versions import needs
from slimtron_quant.errors import CalibrationError
from slimtron_quant.formats import FORMATS, Calibration

OUT, IN = 48, 192
NAMES = ["nvfp4", "w4a16_nvfp4", "mxfp4", "mxfp8"]
NVFP4 = ["nvfp4", "w4a16_nvfp4"]
SIZE = {"nvfp4": 16, "w4a16_nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """Nearest number of a grid from zero up, the one of even index where two are as near."""
    above = torch.searchsorted(grid, x.abs().contiguous()).clamp(max=len(grid) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = grid[above] - x.abs(), x.abs() - grid[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    return torch.where(take_below, grid[below], grid[above]).copysign(x)


def reference(name: str, x: Tensor, tensor_amax: Tensor | None) -> Tensor:
    """What the quantizers compute, written down once more, in float64."""
    blocks = x.double().unflatten(-1, (-1, SIZE[name]))
    amax = blocks.abs().amax(-1, keepdim=True)
    if tensor_amax is not None:
        scale = tensor_amax.double() / (6 * 448)
        step = nearest(amax / (6 * scale), E4M3) * scale
    else:
        step = 2.0 ** torch.ceil(torch.log2(amax / (6 if name == "mxfp4" else 448))).clamp(-127)
    codes = nearest(blocks / torch.where(step > 0, step, 1), E4M3 if name == "mxfp8" else E2M1)
    return torch.where(step > 0, codes * step, 0).flatten(-2).to(x.dtype)


def random_weight(dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    weight *= torch.logspace(-2, 1, OUT)[:, None]
    weight[3] = 0
    weight[4, 32:64] = 0
    return weight.to(dtype)


def tensor_amax(name: str, x: Tensor) -> Tensor | None:
    return x.abs().amax() if name in NVFP4 else None


def block_amax(name: str, x: Tensor) -> Tensor:
    return x.float().unflatten(-1, (-1, SIZE[name])).abs().amax(-1)


def pack(name: str, weight: Tensor, like: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Packs ``weight`` with the scales of ``like``."""
    like = weight if like is None else like
    arguments: dict[str, Any] = {
        "weight_amax": block_amax(name, like),
        "tensor_amax": tensor_amax(name, like),
        "input_amax": torch.tensor(3.0),
    }
    return FORMATS[name].pack(weight, Calibration(**{**arguments, **kwargs}))


def unpack(name: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return FORMATS[name].unpack(tensors, dtype=dtype, shape=(OUT, IN))


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[key].double(), others[key].double()) for key in tensors
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_known_beforehand(name: str) -> None:
    tensors = pack(name, random_weight(torch.float32))
    assert FORMATS[name].stored_bits((OUT, IN)) == {
        suffix: tensor.numel() * tensor.element_size() * 8 for suffix, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
class TestWeights:
    def test_decode_to_the_reference(self, name: str, dtype: torch.dtype) -> None:
        weight = random_weight(dtype)
        decoded = unpack(name, pack(name, weight), dtype)
        expected = reference(name, weight, tensor_amax(name, weight)).float()
        # One rounding of float32 apart, and then of the type.
        torch.testing.assert_close(decoded, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)

    def test_rounded_weight_packs_to_the_same_codes(self, name: str, dtype: torch.dtype) -> None:
        weight = random_weight(dtype)
        rounded = reference(name, weight, tensor_amax(name, weight))
        direct, again = pack(name, weight), pack(name, rounded, like=weight)
        if dtype == torch.float16:
            # Some of the products are too small for this type.
            tiny = weight.abs() < 6e-5
            assert bool((unpack(name, direct) == unpack(name, again))[~tiny].all())
        else:
            assert torch.equal(unpack(name, direct), unpack(name, again))

    @needs("nvidia-modelopt", "0.47", what="packing of NVFP4 on the CPU")
    def test_bytes_are_those_of_modelopts_packing(self, name: str, dtype: torch.dtype) -> None:
        weight = random_weight(dtype)
        tensors = pack(name, weight)
        scale = tensors["weight_scale"]
        used = block_amax(name, weight) > 0
        if name == "mxfp8":
            qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp8_tensor")
            packed, expected = qtensor.MXFP8QTensor.quantize(weight)
        elif name == "mxfp4":
            packed, expected = MXFP4QTensor.quantize(weight, 32)
            expected = expected.reshape(scale.shape)
        else:
            packed, expected, second = NVFP4QTensor.quantize(weight.clone(), 16)
            assert torch.equal(tensors["weight_scale_2"], second)
        assert scale.dtype == expected.dtype
        # ModelOpt gives blocks of zeros the scale 1 in NVFP4.
        assert torch.equal(scale[used].view(torch.uint8), expected[used].view(torch.uint8))
        codes, theirs = tensors["weight"], packed._quantized_data
        assert codes.dtype == theirs.dtype
        assert codes.shape == theirs.shape
        if name == "mxfp4":
            # It gives zero the code of minus zero, and rounds ties down where its kernel and
            # the standard round them to even.
            used = used.repeat_interleave(16, 1)
            differ = (codes != theirs) & used
            assert differ.float().mean() < (0 if dtype == torch.float32 else 0.05) + 1e-9
        else:
            assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_activations_are_rounded_as_weights_are(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.randn(5, 3, IN) * torch.logspace(-3, 1, 5)[:, None, None]).to(dtype)
    x[1, 1, :64] = 0
    # Smaller than what calibration has seen, and larger: the scale saturates.
    for amax in (torch.tensor(97.538171), torch.tensor(4.3170967)) if name == "nvfp4" else (None,):
        scale = None if amax is None else amax / (6 * 448)
        rounded = FORMATS[name].quantize_activation(x, scale)
        assert rounded.dtype == dtype
        expected = reference(name, x, amax)
        torch.testing.assert_close(rounded, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_weight_only_leaves_activations_alone() -> None:
    x = torch.randn(2, IN)
    assert FORMATS["w4a16_nvfp4"].quantize_activation(x, None) is x
    assert "input_scale" not in pack("w4a16_nvfp4", random_weight(torch.float32))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_ties_go_to_even(name: str) -> None:
    weight = torch.zeros(2, 32)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight[:, :7], weight[:, 7], weight[:, 16] = torch.stack([ties, -ties]), 6.0, 6.0
    kwargs = {"tensor_amax": torch.tensor(6.0 * 448)} if name == "nvfp4" else {}
    tensors = pack(name, weight, **kwargs)
    decoded = FORMATS[name].unpack(tensors, dtype=torch.float32, shape=(2, 32))
    assert decoded[0, :7].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert decoded[1, :7].tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_microscaling_steps_at_exact_powers() -> None:
    for name, largest in (("mxfp4", 6.0), ("mxfp8", 448.0)):
        weight = torch.zeros(3, 32)
        weight[0, 0] = largest * 2.0**-9
        weight[1, 0] = math.nextafter(largest * 2.0**-9, 1) * (1 + 2**-20)
        weight[2, 0] = 2.0**-140
        tensors = pack(name, weight)
        assert tensors["weight_scale"].tolist() == [[118], [119], [0]]
        decoded = FORMATS[name].unpack(tensors, dtype=torch.float32, shape=(3, 32))
        assert decoded[0, 0] == weight[0, 0]


def test_tiny_blocks_of_nvfp4_vanish_or_share_the_smallest_scale() -> None:
    """A block's scale is E4M3: below a millionth of the tensor's amax nothing is left."""
    weight = torch.zeros(1, 64)
    weight[0, 0] = 1.0
    weight[0, 16] = 2.0**-9 / 448
    weight[0, 32] = 2.0**-10 / 448
    weight[0, 48] = 2.0**-10 / 448 * 1.01
    tensors = pack("w4a16_nvfp4", weight)
    assert tensors["weight_scale"].double().tolist()[0] == [448, 2.0**-9, 2.0**-9, 2.0**-9]
    decoded = FORMATS["w4a16_nvfp4"].unpack(tensors, dtype=torch.float32, shape=(1, 64))
    kept = torch.tensor([1.0, 2.0**-9 / 448, 0.0, 2.0**-10 / 448])
    torch.testing.assert_close(decoded[0, ::16], kept, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_zeros(name: str) -> None:
    tensors = pack(name, torch.zeros(OUT, IN))
    assert bool((unpack(name, tensors) == 0).all())


@pytest.mark.parametrize(
    ("name", "compressor", "numbers"),
    [
        ("w4a16_nvfp4", "nvfp4-pack-quantized", {"num_bits": 4, "group_size": 16}),
        ("mxfp4", "mxfp4-pack-quantized", {"num_bits": 4, "group_size": 32}),
        ("mxfp8", "mxfp8-quantized", {"num_bits": 8, "group_size": 32}),
    ],
)
def test_compressed_tensors_decodes_the_same(
    name: str, compressor: str, numbers: dict[str, int]
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors = pack(name, random_weight(torch.bfloat16))
    strategy = "tensor_group" if name in NVFP4 else "group"
    args = quantization.QuantizationArgs(type="float", strategy=strategy, symmetric=True, **numbers)
    state = {
        "weight" if name == "mxfp8" else "weight_packed": tensors["weight"],
        "weight_scale": tensors["weight_scale"],
    }
    if name in NVFP4:
        state["weight_global_scale"] = tensors["weight_scale_2"].reciprocal()
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    kind = compressors.BaseCompressor.get_value_from_registry(compressor)
    decoded = kind.decompress(state, scheme)
    # It multiplies in bfloat16.
    torch.testing.assert_close(decoded["weight"].float(), unpack(name, tensors), rtol=2**-6, atol=0)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nvfp4", 4 + 8 / 16 + 64 / (OUT * IN)),
        ("w4a16_nvfp4", 4 + 8 / 16 + 32 / (OUT * IN)),
        ("mxfp4", 4 + 8 / 32),
        ("mxfp8", 8 + 8 / 32),
    ],
)
def test_bits_per_weight_count_the_scales(name: str, bits: float) -> None:
    tensors = pack(name, random_weight(torch.float32))
    assert FORMATS[name].bits_per_weight(tensors) == pytest.approx(bits)


@pytest.mark.parametrize("name", NAMES)
def test_partial_blocks_are_refused(name: str) -> None:
    shape = (OUT, IN + SIZE[name] // 2)
    calibration = Calibration(weight_amax=torch.ones(OUT, IN // SIZE[name]))
    with pytest.raises(CheckpointError, match=f"blocks of {SIZE[name]} on"):
        FORMATS[name].pack(torch.ones(shape), calibration)
    with pytest.raises(CheckpointError, match=f"blocks of {SIZE[name]} on"):
        FORMATS[name].unpack({}, dtype=torch.float32, shape=shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_refuses_meaningless_scales(name: str, bad: float) -> None:
    weight = random_weight(torch.float32)
    amax = block_amax(name, weight)
    amax[5, 2] = bad
    with pytest.raises(CalibrationError, match="weight amax"):
        pack(name, weight, weight_amax=amax)
    if name in NVFP4:
        with pytest.raises(CalibrationError, match="tensor amax"):
            pack(name, weight, tensor_amax=torch.tensor(bad))


def test_refuses_missing_scales() -> None:
    weight = random_weight(torch.float32)
    with pytest.raises(CalibrationError, match="input amax"):
        pack("nvfp4", weight, input_amax=None)
    with pytest.raises(CalibrationError, match="tensor amax"):
        pack("w4a16_nvfp4", weight, tensor_amax=None)
    with pytest.raises(CheckpointError, match="input_scale"):
        FORMATS["nvfp4"].quantize_activation(weight, None)


def test_pre_quant_scale_is_stored_where_the_layout_has_it() -> None:
    factor = torch.linspace(0.5, 2, IN).to(torch.bfloat16)
    weight = random_weight(torch.float32)
    tensors = pack("nvfp4", weight, input_factor=factor)
    assert torch.equal(tensors["pre_quant_scale"], factor)
    with pytest.raises(CheckpointError, match="pre_quant_scale"):
        unpack("nvfp4", {**tensors, "pre_quant_scale": factor[1:]})
    for name in NAMES[1:]:
        with pytest.raises(CheckpointError, match="pre_quant_scale"):
            pack(name, weight, input_factor=factor)


@pytest.mark.parametrize("name", NAMES)
class TestDamagedTensors:
    def test_missing_cut_or_of_another_type(self, name: str) -> None:
        tensors = pack(name, random_weight(torch.float32))
        for suffix, tensor in tensors.items():
            without = {key: value for key, value in tensors.items() if key != suffix}
            with pytest.raises(CheckpointError, match=suffix):
                unpack(name, without)
            with pytest.raises(CheckpointError, match=suffix):
                unpack(name, {**tensors, suffix: tensor.reshape(-1)[:1].repeat(2)})
            with pytest.raises(CheckpointError, match=suffix):
                unpack(name, {**tensors, suffix: tensor.float().to(torch.float64)})

    def test_useless_scale(self, name: str) -> None:
        tensors = pack(name, random_weight(torch.float32))
        scale = tensors["weight_scale"].clone()
        scale.view(torch.uint8)[-1, -1] = 0xFF
        with pytest.raises(CheckpointError, match="weight_scale"):
            unpack(name, {**tensors, "weight_scale": scale})
