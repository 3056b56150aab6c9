"""FP8: E4M3 floats, scaled by tensor, by output channel or by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_quant.errors import CalibrationError
from slimtron_quant.formats.base import (
    VANISHING_AMAX,
    Calibration,
    Format,
    needed_scale,
    refuse_input_factor,
    scales,
    take,
)
from slimtron_quant.formats.codes import E4M3_MAX, e4m3, to_blocks

__all__ = ["BlockFp8", "Fp8", "Fp8PerChannel", "round_to_scaled_e4m3"]

_FLOAT8 = {"num_bits": 8, "type": "float"}


def round_to_scaled_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds to E4M3 numbers times a scale; float32.

    Args:
        x: Any float type.
        scale: Broadcastable to ``x``.
    """
    # Multiplied as ModelOpt does: a tie that falls the other way moves whole layers after it.
    return e4m3(x.float() * scale.reciprocal()).float() * scale


@dataclass(frozen=True, slots=True)
class Fp8(Format):
    """One scale a tensor: ``weight`` ``[out, in]``, ``weight_scale``, ``input_scale`` scalars."""

    quant_algo: ClassVar[str] = "FP8"
    scalars: ClassVar[tuple[str, ...]] = ("input_scale",)

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        refuse_input_factor(calibration, self.name)
        amax, input_amax = calibration.weight_amax, calibration.input_amax
        factor, scale = scales(amax, E4M3_MAX, count=1, what="weight amax", reciprocal=True)
        _, input_scale = scales(input_amax, E4M3_MAX, count=1, what="input amax", reciprocal=True)
        return {
            "weight": e4m3(weight.detach().float() * factor),
            "weight_scale": scale.reshape(()),
            "input_scale": input_scale.reshape(()),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        codes = take(tensors, "weight", torch.float8_e4m3fn, shape)
        scale = take(tensors, "weight_scale", torch.float32, ())
        take(tensors, "input_scale", torch.float32, ())
        return (codes.float() * scale).to(dtype).float()

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        return round_to_scaled_e4m3(x, needed_scale(input_scale, self.name)).to(x.dtype)

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        return {
            "input_activations": {"dynamic": False, **_FLOAT8},
            "weights": {"dynamic": False, **_FLOAT8},
        }


@dataclass(frozen=True, slots=True)
class Fp8PerChannel(Format):
    """``weight`` ``[out, in]``, ``weight_scale`` ``[out]``; every token brings its own scale."""

    quant_algo: ClassVar[str] = "FP8_PER_CHANNEL_PER_TOKEN"
    block: ClassVar[tuple[int | None, int | None]] = (1, None)

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        refuse_input_factor(calibration, self.name)
        factor, scale = scales(
            calibration.weight_amax,
            E4M3_MAX,
            count=weight.shape[0],
            what="weight amax",
            reciprocal=True,
        )
        codes = e4m3(weight.detach().float() * factor[:, None])
        return {"weight": codes, "weight_scale": scale}

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        codes = take(tensors, "weight", torch.float8_e4m3fn, shape)
        scale = take(tensors, "weight_scale", torch.float32, shape[:1])
        return (codes.float() * scale[:, None]).to(dtype).float()

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        amax = x.abs().amax(-1, keepdim=True).float()
        safe = torch.where(amax <= VANISHING_AMAX, 1.0, amax)
        factor = safe.reciprocal() * E4M3_MAX
        return (e4m3(x.float() * factor).float() * factor.reciprocal()).to(x.dtype)

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        return {
            "input_activations": {"dynamic": True, **_FLOAT8, "strategy": "token"},
            "weights": {"dynamic": False, **_FLOAT8, "strategy": "channel"},
        }


@dataclass(frozen=True, slots=True)
class BlockFp8(Format):
    """``weight`` ``[out, in]`` in blocks of 128 x 128, activations as they are.

    ``weight_scale`` is ``[out / 128, 1, in / 128, 1]``. vLLM and TensorRT-LLM compute in FP8 and
    round the activations themselves, 128 channels of a token together. Both need whole blocks:
    partial ones, which ModelOpt writes, are refused.
    """

    # As ModelOpt spells it. vLLM takes either case, TensorRT-LLM this one.
    quant_algo: ClassVar[str] = "fp8_pb_wo"
    size: ClassVar[int] = 128
    block: ClassVar[tuple[int | None, int | None]] = (size, size)

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        refuse_input_factor(calibration, self.name)
        self.check_shape(weight.shape)
        out_blocks, in_blocks = (dim // self.size for dim in weight.shape)
        factor, scale = scales(
            calibration.weight_amax,
            E4M3_MAX,
            count=weight.shape[0] * in_blocks,
            what="weight amax",
            reciprocal=True,
        )
        if bool((scale.view(out_blocks, self.size, in_blocks).diff(dim=1) != 0).any()):
            raise CalibrationError(
                f"the output channels of a block of {self.size} were calibrated apart",
                hint="the heads, and each tensor-parallel process's part of a layer, must be "
                "whole blocks: exclude the layer, or take another recipe",
            )
        blocks = to_blocks(weight, self.size)
        codes = e4m3(blocks * factor.view(-1, in_blocks, 1)).flatten(1)
        scale = scale.view(out_blocks, self.size, in_blocks)[:, 0]
        return {"weight": codes, "weight_scale": scale[:, None, :, None].contiguous()}

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        self.check_shape(shape)
        codes = take(tensors, "weight", torch.float8_e4m3fn, shape)
        out_blocks, in_blocks = (dim // self.size for dim in shape)
        scale = take(tensors, "weight_scale", torch.float32, (out_blocks, 1, in_blocks, 1))
        blocks = codes.float().view(out_blocks, self.size, in_blocks, self.size)
        return (blocks * scale).view(*shape).to(dtype).float()

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        blocks = {"strategy": "block", "block_structure": [self.size, self.size]}
        return {"weights": {"dynamic": False, **_FLOAT8, **blocks}}
