"""INT8: one scale for each output channel of the weight and one for the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_quant.formats.base import (
    Calibration,
    Format,
    needed_scale,
    scales,
    take,
    take_input_factor,
)

__all__ = ["Int8"]

_BOUND = 127.0


@dataclass(frozen=True, slots=True)
class Int8(Format):
    """``weight`` ``[out, in]``, ``weight_scale`` ``[out]``, ``input_scale`` a scalar.

    After SmoothQuant, ``pre_quant_scale`` ``[in]`` lies beside them unless it was folded away.
    """

    quant_algo: ClassVar[str] = "W8A8_SQ_PER_CHANNEL"
    block: ClassVar[tuple[int | None, int | None]] = (1, None)
    scalars: ClassVar[tuple[str, ...]] = ("input_scale",)

    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        out_dim, in_dim = weight.shape
        factor, scale = scales(calibration.weight_amax, _BOUND, count=out_dim, what="weight amax")
        _, input_scale = scales(calibration.input_amax, _BOUND, count=1, what="input amax")
        tensors = {
            "weight": _round(weight.detach().float() * factor[:, None]),
            "weight_scale": scale,
            "input_scale": input_scale.reshape(()),
        }
        if calibration.input_factor is not None:
            tensors["pre_quant_scale"] = calibration.input_factor.detach().reshape(in_dim)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        codes = take(tensors, "weight", torch.int8, shape)
        scale = take(tensors, "weight_scale", torch.float32, shape[:1])
        take(tensors, "input_scale", torch.float32, ())
        take_input_factor(tensors, shape[1])
        # Divided as ModelOpt does: the last bit decides how later inputs round.
        return (codes.float() / scale.reciprocal()[:, None]).to(dtype).float()

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        factor = needed_scale(input_scale, self.name).reciprocal()
        return (_round(x.float() * factor).float() / factor).to(x.dtype)

    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        return {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "int"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "int", "strategy": "channel"},
        }


def _round(x: Tensor) -> Tensor:
    return x.round().clamp(-_BOUND - 1, _BOUND).to(torch.int8)
