"""INT4 weights in blocks along the input dimension, activations as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_quant.formats.base import Format, scales, take

__all__ = ["Int4"]

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

    def pack(
        self,
        weight: Tensor,
        weight_amax: Tensor,
        *,
        input_amax: Tensor | None = None,
        pre_quant_scale: Tensor | None = None,
        block_size: int | None = None,
    ) -> dict[str, Tensor]:
        out_dim, in_dim = weight.shape
        _check_pairs(out_dim)
        if not block_size or in_dim % block_size:
            raise CheckpointError(
                "the block size must divide the input dimension",
                where="block_size",
                found=f"blocks of {block_size} on {in_dim} channels",
            )
        blocks = in_dim // block_size
        factor, scale = scales(weight_amax, _BOUND, count=out_dim * blocks, what="weight amax")
        grouped = weight.detach().float().reshape(-1, block_size) * factor[:, None]
        codes = grouped.round().clamp(-_BOUND - 1, _BOUND).to(torch.int8).reshape(out_dim, in_dim)
        low, high = (half.view(torch.uint8) & 0xF for half in (codes[0::2], codes[1::2]))
        tensors = {"weight": low | (high << 4), "weight_scale": scale.reshape(out_dim, blocks)}
        if pre_quant_scale is not None:
            tensors["pre_quant_scale"] = pre_quant_scale.detach().reshape(in_dim)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        out_dim, in_dim = shape
        _check_pairs(out_dim)
        packed = take(tensors, "weight", torch.uint8, (out_dim // 2, in_dim))
        blocks = tensors["weight_scale"].shape[-1] if "weight_scale" in tensors else 1
        scale = take(tensors, "weight_scale", torch.float32, (out_dim, blocks))
        if not blocks or in_dim % blocks:
            raise CheckpointError(
                "the blocks must divide the input dimension",
                where="weight_scale",
                found=f"{blocks} blocks on {in_dim} channels",
            )
        if "pre_quant_scale" in tensors:
            take(tensors, "pre_quant_scale", tensors["pre_quant_scale"].dtype, (in_dim,))
        halves = torch.stack([packed & 0xF, packed >> 4], 1).reshape(out_dim, in_dim)
        # Bit 3 is worth -8 in two's complement.
        codes = (halves ^ 8).float() - 8
        weight = codes.reshape(out_dim, blocks, -1) * scale[..., None]
        return weight.reshape(out_dim, in_dim).to(dtype).float()

    def settings(self, block_size: int | None) -> dict[str, Any]:
        return {
            "quant_algo": self.quant_algo,
            "group_size": block_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
        }

    def scheme(self, block_size: int | None) -> dict[str, Any]:
        weights = {"dynamic": False, "num_bits": 4, "type": "int", "group_size": block_size}
        return {"weights": weights}


def _check_pairs(out_dim: int) -> None:
    if out_dim % 2:
        raise CheckpointError(
            "the INT4 layout packs output channels in pairs", found=f"{out_dim} channels"
        )
