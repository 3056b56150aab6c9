"""Scales of ModelOpt's quantizers that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["find_faults", "has_static_scale", "tensor_quantizers"]


def find_faults(model: nn.Module, *, zero_allowed: bool = False) -> list[str]:
    """Says which scales mean nothing, and why; nothing is changed.

    Args:
        model: Model with ModelOpt's quantizers, calibrated.
        zero_allowed: Whether an amax may be zero.
    """
    faults = []
    for name, quantizer in tensor_quantizers(model):
        pre_quant_scale = getattr(quantizer, "_pre_quant_scale", None)
        # A quantizer that is off still multiplies its input by the factor.
        if pre_quant_scale is not None and (fault := _fault(pre_quant_scale, zero_allowed=False)):
            faults.append(f"{name}: the pre-quant scale is {fault}")
        if not has_static_scale(quantizer):
            continue
        amax = getattr(quantizer, "_amax", None)
        if amax is None:
            faults.append(f"{name}: never saw data")
        elif fault := _fault(amax, zero_allowed=zero_allowed):
            faults.append(f"{name}: amax is {fault}")
    return faults


def tensor_quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """ModelOpt's TensorQuantizers, those inside a sequence one by one."""
    for name, module in model.named_modules():
        if hasattr(module, "num_bits") and not isinstance(module, nn.Sequential):
            yield name, module


def has_static_scale(quantizer: Any) -> bool:
    """Tells whether a quantizer is on and computes with a scale of its own."""
    return bool(
        quantizer.is_enabled
        and not getattr(quantizer, "_dynamic", False)
        and not getattr(quantizer, "_use_constant_amax", False)
        and not getattr(quantizer, "is_mx_format", False)
    )


def _fault(values: Tensor, *, zero_allowed: bool) -> str | None:
    for fault, found in (
        ("NaN", values.isnan()),
        ("infinite", values.isinf()),
        ("negative", values < 0),
        ("zero", values == 0),
    ):
        if bool(found.any()) and not (fault == "zero" and zero_allowed):
            return f"{fault} in {int(found.sum())} of {values.numel()} places"
    return None
