"""A look at every scale after calibration, before anything is written."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_quant.errors import CalibrationError
from slimtron_quant.formats.base import SMALLEST_AMAX
from slimtron_quant.formats.faults import find_faults, has_static_scale, tensor_quantizers

__all__ = ["MendedScale", "ScaleReport", "check_scales"]

logger = logging.getLogger(__name__)

_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MendedScale:
    """A quantizer whose scales were replaced."""

    quantizer: str
    """Dotted name in the model."""

    elements: int
    """Scales replaced, of those the quantizer has."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleReport:
    """What ``check_scales`` found."""

    checked: int
    """Enabled quantizers with scales of their own."""

    mended: tuple[MendedScale, ...]


@torch.no_grad()
def check_scales(model: nn.Module, *, scale_dtype: torch.dtype = torch.float32) -> ScaleReport:
    """Mends the scales that are too small to use and refuses those that mean nothing.

    An amax of zero is mended: a weight channel of zeros still decodes to zeros, and an input
    that was zero throughout gets the scale 1, because what it may become later is unknown. A
    positive amax is raised where its scale would be subnormal, which GPUs flush to zero, or
    where ModelOpt would take it for zero. Local to this process; mending is deterministic, so
    scales that were equal on several processes stay equal.

    Args:
        model: Model with ModelOpt's quantizers, calibrated.
        scale_dtype: Type that scales are stored in.

    Returns:
        What was looked at and mended.

    Raises:
        CalibrationError: A quantizer saw no data, or a scale is NaN, infinite or negative.
    """
    if failures := find_faults(model, zero_allowed=True):
        raise CalibrationError(
            f"calibration left {len(failures)} quantizers without a usable scale",
            found="; ".join(failures[:_LISTED]) + ("; ..." if len(failures) > _LISTED else ""),
            hint=(
                "calibrate on more text so that every layer sees some, look for NaN in the "
                "model's weights, or exclude these layers"
            ),
        )
    mended: list[MendedScale] = []
    checked = 0
    for name, quantizer in tensor_quantizers(model):
        if has_static_scale(quantizer):
            checked += 1
            mended.extend(_mend(name, quantizer, quantizer._amax, scale_dtype))
    for item in mended:
        logger.warning("%s: %s (%d scales)", item.quantizer, item.reason, item.elements)
    return ScaleReport(checked=checked, mended=tuple(mended))


def _mend(
    name: str, quantizer: Any, amax: Tensor, scale_dtype: torch.dtype
) -> Iterator[MendedScale]:
    is_weight = "weight_quantizer" in name.rsplit(".", 2)[-2:]
    floor = _smallest_amax(quantizer.maxbound, scale_dtype)
    zero, low = amax == 0, (amax > 0) & (amax < floor)
    for where, value, reason in (
        (zero, floor if is_weight else quantizer.maxbound, "only zeros were seen"),
        (low, floor, f"amax was below {floor:.3g}"),
    ):
        if bool(where.any()):
            amax.masked_fill_(where, value)
            yield MendedScale(quantizer=name, elements=int(where.sum()), reason=reason)


def _smallest_amax(bound: float, scale_dtype: torch.dtype) -> float:
    """A power of two, exact whatever type the amax is held in."""
    normal = torch.finfo(scale_dtype).smallest_normal * bound
    return max(SMALLEST_AMAX, 2.0 ** math.ceil(math.log2(normal)))
