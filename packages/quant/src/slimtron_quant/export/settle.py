"""Scales that survive being stored.

ModelOpt keeps the largest magnitude and divides the largest code by it; files hold the reciprocal
of that quotient. Reciprocals of rounded numbers do not always lead back: about one scale in seven
is read as its neighbour. A number that lies half-way between two codes then falls the other way,
and the difference grows from layer to layer. Here magnitudes move up by a few units in the last
place, to the next one that is read as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtron_quant.formats.base import VANISHING_AMAX
from slimtron_quant.formats.codes import E4M3_MAX
from slimtron_quant.formats.faults import has_static_scale, tensor_quantizers

__all__ = ["settle_scales"]

_STEPS = 1024
"""Most units to move by, a ten-thousandth. Steps of two units in the quotient can miss for long."""


@torch.no_grad()
def settle_scales(model: nn.Module) -> None:
    """Moves the largest magnitudes in place; done twice, it changes nothing.

    Args:
        model: The bare model with calibrated quantizers. Scales in a half type stay: a unit in
            their last place is too much.
    """
    for _, quantizer in tensor_quantizers(model):
        if has_static_scale(quantizer) and quantizer._amax.dtype == torch.float32:
            quantizer._amax.copy_(_settled(quantizer._amax, quantizer.num_bits))


def _settled(amax: Tensor, num_bits: Any) -> Tensor:
    found = amax.flatten().clone()
    left = (found > VANISHING_AMAX).nonzero().flatten()
    candidate = found[left]
    for _ in range(_STEPS):
        factor = _codes_per_unit(candidate, num_bits)
        if factor is None or not len(left):
            break
        returns = factor.reciprocal().reciprocal() == factor
        found[left[returns]] = candidate[returns]
        left, candidate = left[~returns], candidate[~returns]
        candidate = candidate.nextafter(torch.full_like(candidate, torch.inf))
    return found.view_as(amax)


def _codes_per_unit(amax: Tensor, num_bits: Any) -> Tensor | None:
    """What ModelOpt multiplies by, rounding as it does; None for formats that scale otherwise."""
    if isinstance(num_bits, int):
        # torch divides a number by a tensor as it multiplies by the reciprocal.
        return torch.full_like(amax, 2.0 ** (num_bits - 1) - 1) / amax
    return amax.reciprocal() * E4M3_MAX if num_bits == (4, 3) else None
