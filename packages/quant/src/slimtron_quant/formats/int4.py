"""INT4 weights in blocks along the input dimension, activations as they are or in FP8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_quant.formats.base import (
    Calibration,
    Format,
    needed_scale,
    scales,
    take,
    take_input_factor,
)
from slimtron_quant.formats.codes import E4M3_MAX, pack_pairs, to_blocks, unpack_pairs
from slimtron_quant.formats.fp8 import round_to_scaled_e4m3

__all__ = ["W4A8", "Int4"]

_BOUND = 7.0


@dataclass(frozen=True, slots=True)
class Int4(Format):
    """``weight`` ``[out / 2, in]`` uint8, ``weight_scale`` ``[out, in / block]``.

    A byte holds two output channels of one input channel, the even one in its low half, as
    two's complement. ``pre_quant_scale`` ``[in]`` lies beside them where there is a factor on
    the input channels that was not folded into the layer before.
    """

    quant_algo: ClassVar[str] = "W4A16_AWQ"
    weights_per_code: ClassVar[int] = 2
    # TensorRT-LLM reads one for these layers whether AWQ ran or not.
    always_stores_input_factor: ClassVar[bool] = True

    def block_shape(self, block_size: int | None = None) -> tuple[int | None, int | None]:
        return 1, block_size

    def misfit(self, shape: Sequence[int], block_size: int | None = None) -> str | None:
        out_dim, in_dim = shape
        if out_dim % 2:
            return f"{out_dim} output channels, which are packed in pairs"
        if not block_size or in_dim % block_size:
            return f"blocks of {block_size} on {in_dim} input channels"
        return None

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        block_size = calibration.block_size
        self.check_shape(weight.shape, block_size)
        assert block_size is not None
        out_dim, in_dim = weight.shape
        count = weight.numel() // block_size
        factor, scale = scales(calibration.weight_amax, _BOUND, count=count, what="weight amax")
        blocks = to_blocks(weight, block_size) * factor.view(out_dim, -1, 1)
        codes = blocks.round().clamp(-_BOUND - 1, _BOUND).to(torch.int8).flatten(1)
        tensors = {
            "weight": pack_pairs(codes.view(torch.uint8) & 0xF, 0),
            "weight_scale": scale.view(out_dim, -1),
        }
        if calibration.input_factor is not None:
            tensors["pre_quant_scale"] = calibration.input_factor.detach().reshape(in_dim)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        out_dim, in_dim = shape
        blocks = tensors["weight_scale"].shape[-1] if "weight_scale" in tensors else 1
        if not blocks or in_dim % blocks:
            raise CheckpointError(
                "the blocks must divide the input dimension",
                where="weight_scale",
                found=f"{blocks} blocks on {in_dim} channels",
            )
        self.check_shape(shape, in_dim // blocks)
        packed = take(tensors, "weight", torch.uint8, (out_dim // 2, in_dim))
        scale = take(tensors, "weight_scale", torch.float32, (out_dim, blocks))
        take_input_factor(tensors, in_dim)
        # Bit 3 is worth -8 in two's complement.
        codes = (unpack_pairs(packed, 0) ^ 8).float() - 8
        # Divided as ModelOpt does: what is rounded afterwards depends on the last bit.
        factor = scale.reciprocal()[..., None]
        return (to_blocks(codes, in_dim // blocks) / factor).flatten(1).to(dtype).float()

    def settings(
        self, block_size: int | None = None, *, has_input_factors: bool = False
    ) -> dict[str, Any]:
        return {
            "quant_algo": self.quant_algo,
            "group_size": block_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
        }

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        weights = {"dynamic": False, "num_bits": 4, "type": "int", "group_size": block_size}
        return {"weights": weights}


@dataclass(frozen=True, slots=True)
class W4A8(Int4):
    """INT4 weights that are rounded once more, to FP8, to be multiplied with FP8 activations.

    ``weight``, ``weight_scale`` and ``pre_quant_scale`` are those of ``Int4``;
    ``weight_scale_2``, a scalar, scales the E4M3 weights and ``input_scale`` the activations.
    """

    quant_algo: ClassVar[str] = "W4A8_AWQ"
    has_two_levels: ClassVar[bool] = True
    scalars: ClassVar[tuple[str, ...]] = ("weight_scale_2", "input_scale")

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        tensors = Int4.pack(self, weight, calibration)
        for suffix, amax, what in (
            ("weight_scale_2", calibration.tensor_amax, "tensor amax"),
            ("input_scale", calibration.input_amax, "input amax"),
        ):
            _, scale = scales(amax, E4M3_MAX, count=1, what=what, reciprocal=True)
            tensors[suffix] = scale.reshape(())
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        integers = Int4.unpack(self, tensors, dtype=dtype, shape=shape)
        scale = take(tensors, "weight_scale_2", torch.float32, ())
        take(tensors, "input_scale", torch.float32, ())
        return round_to_scaled_e4m3(integers, scale).to(dtype).float()

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        return round_to_scaled_e4m3(x, needed_scale(input_scale, self.name)).to(x.dtype)

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        return {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            **Int4.scheme(self, block_size),
        }
