"""NVFP4: E2M1 floats in blocks of 16 with E4M3 scales, themselves scaled by one float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_quant.formats.base import (
    SMALLEST_AMAX,
    VANISHING_AMAX,
    Calibration,
    Format,
    checked_amax,
    needed_scale,
    refuse_input_factor,
    take,
    take_input_factor,
)
from slimtron_quant.formats.codes import (
    E2M1_MAX,
    E4M3_MAX,
    block_amax,
    e2m1_from_codes,
    e4m3,
    pack_pairs,
    to_blocks,
    to_e2m1_codes,
    unpack_pairs,
)

__all__ = ["Nvfp4", "Nvfp4WeightOnly"]


@dataclass(frozen=True, slots=True)
class Nvfp4WeightOnly(Format):
    """NVFP4 weights, activations as they are.

    ``weight`` is ``[out, in / 2]`` uint8, two input channels a byte, the even one in its low
    half; ``weight_scale`` ``[out, in / 16]`` E4M3; ``weight_scale_2`` a float32 scalar. A weight
    is the product of the three.
    """

    quant_algo: ClassVar[str] = "W4A16_NVFP4"
    weights_per_code: ClassVar[int] = 2
    takes_amax_from_weight: ClassVar[bool] = True
    has_two_levels: ClassVar[bool] = True
    size: ClassVar[int] = 16
    block: ClassVar[tuple[int | None, int | None]] = (1, size)
    scale_bits: ClassVar[int] = 8
    scalars: ClassVar[tuple[str, ...]] = ("weight_scale_2",)

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        refuse_input_factor(calibration, self.name)
        return self._pack_weight(weight, calibration)

    def _pack_weight(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        self.check_shape(weight.shape)
        count = weight.numel() // self.size
        amax = checked_amax(calibration.weight_amax, count=count, what="weight amax")
        tensor_scale = _scale_of_scales(calibration.tensor_amax, "tensor amax")
        block_scale = _block_scale(amax.view(weight.shape[0], -1), tensor_scale)
        codes = _encode(to_blocks(weight, self.size), block_scale, tensor_scale)
        # What a zero scale covers is zero. A positive one says so, too, and can be divided by.
        smallest = 2.0**-9
        return {
            "weight": pack_pairs(codes.flatten(1), 1),
            "weight_scale": e4m3(block_scale.float().clamp(min=smallest)),
            "weight_scale_2": tensor_scale,
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        self.check_shape(shape)
        out_dim, in_dim = shape
        packed = take(tensors, "weight", torch.uint8, (out_dim, in_dim // 2))
        blocks = (out_dim, in_dim // self.size)
        block_scale = take(tensors, "weight_scale", torch.float8_e4m3fn, blocks)
        tensor_scale = take(tensors, "weight_scale_2", torch.float32, ())
        codes = to_blocks(e2m1_from_codes(unpack_pairs(packed, 1)), self.size)
        steps = block_scale.float() * tensor_scale
        return (codes * steps[..., None]).flatten(1).to(dtype).float()

    def settings(
        self, block_size: int | None = None, *, has_input_factors: bool = False
    ) -> dict[str, Any]:
        return {"quant_algo": self.quant_algo, "group_size": self.size}

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        return {"weights": self._numbers()}

    def _numbers(self) -> dict[str, Any]:
        return {"dynamic": False, "num_bits": 4, "type": "float", "group_size": self.size}


@dataclass(frozen=True, slots=True)
class Nvfp4(Nvfp4WeightOnly):
    """NVFP4 weights and activations.

    ``input_scale`` (float32 scalar) scales the E4M3 scales that each 16 channels of a token get
    when the model runs. After AWQ, ``pre_quant_scale`` ``[in]`` lies beside them unless it was
    folded away: TensorRT-LLM reads it, vLLM has no place for it.
    """

    quant_algo: ClassVar[str] = "NVFP4"
    scalars: ClassVar[tuple[str, ...]] = ("weight_scale_2", "input_scale")

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        tensors = self._pack_weight(weight, calibration)
        tensors["input_scale"] = _scale_of_scales(calibration.input_amax, "input amax")
        if calibration.input_factor is not None:
            tensors["pre_quant_scale"] = calibration.input_factor.detach().reshape(-1)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        weight = Nvfp4WeightOnly.unpack(self, tensors, dtype=dtype, shape=shape)
        take(tensors, "input_scale", torch.float32, ())
        take_input_factor(tensors, shape[1])
        return weight

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        tensor_scale = needed_scale(input_scale, self.name)
        block_scale = _block_scale(block_amax(x, self.size), tensor_scale)
        codes = _encode(to_blocks(x, self.size), block_scale, tensor_scale)
        steps = block_scale.float() * tensor_scale
        return (e2m1_from_codes(codes) * steps[..., None]).flatten(-2).to(x.dtype)

    def settings(
        self, block_size: int | None = None, *, has_input_factors: bool = False
    ) -> dict[str, Any]:
        settings = Nvfp4WeightOnly.settings(self)
        if has_input_factors:
            settings |= {
                "quant_algo": "NVFP4_AWQ",
                "has_zero_point": False,
                "pre_quant_scale": True,
            }
        return settings

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        return {"input_activations": self._numbers(), "weights": self._numbers()}


def _scale_of_scales(amax: Tensor | None, what: str) -> Tensor:
    """The scalar at which the largest number gets the largest code and the largest scale."""
    checked = checked_amax(amax, count=1, what=what)
    safe = torch.where(checked <= VANISHING_AMAX, SMALLEST_AMAX, checked)
    return (safe / (E2M1_MAX * E4M3_MAX)).reshape(())


def _block_scale(amax: Tensor, tensor_scale: Tensor) -> Tensor:
    return e4m3(amax / (E2M1_MAX * tensor_scale))


def _encode(blocks: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    steps = block_scale.float() * tensor_scale
    return to_e2m1_codes(blocks / torch.where(steps > 0, steps, torch.inf)[..., None])
