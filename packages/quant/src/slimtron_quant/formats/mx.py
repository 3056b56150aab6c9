"""OCP Microscaling: floats of 4 or 8 bits in blocks of 32, each scaled by a power of two."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_quant.formats.base import (
    Calibration,
    Format,
    checked_amax,
    refuse_input_factor,
    take,
)
from slimtron_quant.formats.codes import (
    E2M1_MAX,
    E4M3_MAX,
    block_amax,
    e2m1_from_codes,
    e4m3,
    e8m0_codes,
    e8m0_from_codes,
    pack_pairs,
    to_blocks,
    to_e2m1_codes,
    unpack_pairs,
)

__all__ = ["Mxfp4", "Mxfp8"]


@dataclass(frozen=True, slots=True)
class _Microscaling(Format):
    """``weight_scale`` ``[out, in / 32]`` uint8, the exponent of a power of two plus 127.

    Activations are scaled in the same way when the model runs.
    """

    takes_amax_from_weight: ClassVar[bool] = True
    size: ClassVar[int] = 32
    block: ClassVar[tuple[int | None, int | None]] = (1, size)
    scale_bits: ClassVar[int] = 8
    bits: ClassVar[int]
    largest: ClassVar[float]
    code_dtype: ClassVar[torch.dtype]

    @abstractmethod
    def _encode(self, x: Tensor) -> Tensor:
        """Rounds float32 numbers to codes, one an element."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """The float32 numbers that codes stand for."""

    def _to_disk(self, codes: Tensor) -> Tensor:
        return codes

    def _from_disk(self, weight: Tensor) -> Tensor:
        return weight

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        refuse_input_factor(calibration, self.name)
        self.check_shape(weight.shape)
        count = weight.numel() // self.size
        amax = checked_amax(calibration.weight_amax, count=count, what="weight amax")
        scale = e8m0_codes(amax.view(weight.shape[0], -1), self.largest)
        blocks = to_blocks(weight, self.size) / e8m0_from_codes(scale)[..., None]
        return {"weight": self._to_disk(self._encode(blocks).flatten(1)), "weight_scale": scale}

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        self.check_shape(shape)
        out_dim, in_dim = shape
        stored = (out_dim, in_dim // self.weights_per_code)
        codes = self._from_disk(take(tensors, "weight", self.code_dtype, stored))
        scale = take(tensors, "weight_scale", torch.uint8, (out_dim, in_dim // self.size))
        blocks = to_blocks(self._decode(codes), self.size) * e8m0_from_codes(scale)[..., None]
        return blocks.flatten(1).to(dtype).float()

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        steps = e8m0_from_codes(e8m0_codes(block_amax(x, self.size), self.largest))[..., None]
        rounded = self._decode(self._encode(to_blocks(x, self.size) / steps)) * steps
        return rounded.flatten(-2).to(x.dtype)

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        numbers = {"num_bits": self.bits, "type": "float", "group_size": self.size}
        return {
            "input_activations": {"dynamic": True, **numbers},
            "weights": {"dynamic": False, **numbers},
        }


@dataclass(frozen=True, slots=True)
class Mxfp4(_Microscaling):
    """E2M1: ``weight`` ``[out, in / 2]`` uint8, the even input channel in a byte's low half."""

    # As ModelOpt spells it; none of vLLM, SGLang and TensorRT-LLM reads the name.
    quant_algo: ClassVar[str] = "mxfp4"
    weights_per_code: ClassVar[int] = 2
    bits: ClassVar[int] = 4
    largest: ClassVar[float] = E2M1_MAX
    code_dtype: ClassVar[torch.dtype] = torch.uint8

    def _encode(self, x: Tensor) -> Tensor:
        return to_e2m1_codes(x)

    def _decode(self, codes: Tensor) -> Tensor:
        return e2m1_from_codes(codes)

    def _to_disk(self, codes: Tensor) -> Tensor:
        return pack_pairs(codes, 1)

    def _from_disk(self, weight: Tensor) -> Tensor:
        return unpack_pairs(weight, 1)


@dataclass(frozen=True, slots=True)
class Mxfp8(_Microscaling):
    """E4M3: ``weight`` ``[out, in]``."""

    quant_algo: ClassVar[str] = "MXFP8"
    bits: ClassVar[int] = 8
    largest: ClassVar[float] = E4M3_MAX
    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def _encode(self, x: Tensor) -> Tensor:
        return e4m3(x)

    def _decode(self, codes: Tensor) -> Tensor:
        return codes.float()

    def settings(
        self, block_size: int | None = None, *, has_input_factors: bool = False
    ) -> dict[str, Any]:
        return {"quant_algo": self.quant_algo, "group_size": self.size}
