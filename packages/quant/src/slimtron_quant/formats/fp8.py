"""FP8: E4M3 floats with one scale for the weight and one for the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_quant.formats.base import Format, scales, take

__all__ = ["Fp8"]

_BOUND = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True)
class Fp8(Format):
    """Per-tensor E4M3: ``weight`` ``[out, in]``, ``weight_scale`` and ``input_scale`` scalars."""

    quant_algo: ClassVar[str] = "FP8"

    def pack(
        self,
        weight: Tensor,
        weight_amax: Tensor,
        *,
        input_amax: Tensor | None = None,
        pre_quant_scale: Tensor | None = None,
        block_size: int | None = None,
    ) -> dict[str, Tensor]:
        if pre_quant_scale is not None:
            raise CheckpointError(
                "the FP8 layout has no place for a factor on the input",
                where="pre_quant_scale",
                hint="fold it into the layer before",
            )
        factor, scale = scales(weight_amax, _BOUND, count=1, what="weight amax", reciprocal=True)
        _, input_scale = scales(input_amax, _BOUND, count=1, what="input amax", reciprocal=True)
        return {
            "weight": _round(weight.detach().float() * factor),
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
        if input_scale is None:
            raise CheckpointError("FP8 activations need a scale", where="input_scale")
        # Multiplied as ModelOpt does: a tie that falls the other way moves whole layers after it.
        return (_round(x.float() * input_scale.reciprocal()).float() * input_scale).to(x.dtype)

    def settings(self, block_size: int | None) -> dict[str, Any]:
        return {"quant_algo": self.quant_algo}

    def scheme(self, block_size: int | None) -> dict[str, Any]:
        return {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
        }


def _round(x: Tensor) -> Tensor:
    # The conversion makes NaN of what exceeds the range: it has no infinity to saturate to.
    return x.clamp(-_BOUND, _BOUND).to(torch.float8_e4m3fn)
