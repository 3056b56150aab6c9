"""INT8: one scale for each output channel of the weight and one for the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_quant.formats.base import Format, scales, take

__all__ = ["Int8"]

_BOUND = 127.0


@dataclass(frozen=True, slots=True)
class Int8(Format):
    """``weight`` ``[out, in]``, ``weight_scale`` ``[out]``, ``input_scale`` a scalar.

    After SmoothQuant, ``pre_quant_scale`` ``[in]`` lies beside them unless it was folded away.
    """

    quant_algo: ClassVar[str] = "W8A8_SQ_PER_CHANNEL"

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
        factor, scale = scales(weight_amax, _BOUND, count=out_dim, what="weight amax")
        _, input_scale = scales(input_amax, _BOUND, count=1, what="input amax")
        tensors = {
            "weight": _round(weight.detach().float() * factor[:, None]),
            "weight_scale": scale,
            "input_scale": input_scale.reshape(()),
        }
        if pre_quant_scale is not None:
            tensors["pre_quant_scale"] = pre_quant_scale.detach().reshape(in_dim)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        codes = take(tensors, "weight", torch.int8, shape)
        scale = take(tensors, "weight_scale", torch.float32, shape[:1])
        take(tensors, "input_scale", torch.float32, ())
        if "pre_quant_scale" in tensors:
            take(tensors, "pre_quant_scale", tensors["pre_quant_scale"].dtype, shape[1:])
        return (codes.float() * scale[:, None]).to(dtype).float()

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        if input_scale is None:
            raise CheckpointError("INT8 activations need a scale", where="input_scale")
        return (_round(x.float() * input_scale.reciprocal()).float() * input_scale).to(x.dtype)

    def settings(self, block_size: int | None) -> dict[str, Any]:
        return {"quant_algo": self.quant_algo}

    def scheme(self, block_size: int | None) -> dict[str, Any]:
        return {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "int"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "int", "strategy": "channel"},
        }


def _round(x: Tensor) -> Tensor:
    return x.round().clamp(-_BOUND - 1, _BOUND).to(torch.int8)
