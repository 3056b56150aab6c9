"""A floor under the scales of the inputs of models with squared ReLU."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from slimtron_quant.calibration.scales import MendedScale
from slimtron_quant.recipes.rules import SMALLEST_INPUT_SCALE

__all__ = ["floor_input_scales"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def floor_input_scales(model: nn.Module) -> list[MendedScale]:
    """Raises the input scales that a squared ReLU leaves too small.

    Squared activations have rare large values that calibration text misses. FP8 and INT8
    SmoothQuant inputs get an amax of at least 0.01 times the largest code, as in NeMo; other
    formats, and models with another activation, stay as they are.

    Args:
        model: The bare Megatron-Core model, calibrated, its factors not folded yet.

    Returns:
        What was raised.
    """
    from megatron.core.activations import squared_relu

    config: Any = model.config
    if config.activation_func is not squared_relu:
        return []
    raised = []
    for name, module in model.named_modules():
        inputs: Any = getattr(module, "input_quantizer", None)
        if inputs is None or not inputs.is_enabled or not _applies(module):
            continue
        floor = SMALLEST_INPUT_SCALE * inputs.maxbound
        low = inputs._amax < floor
        if bool(low.any()):
            inputs._amax.clamp_(min=floor)
            reason = f"squared ReLU: amax was below {floor:.3g}"
            logger.info("%s.input_quantizer: %s", name, reason)
            raised.append(
                MendedScale(
                    quantizer=f"{name}.input_quantizer", elements=int(low.sum()), reason=reason
                )
            )
    return raised


def _applies(module: Any) -> bool:
    inputs, weight = module.input_quantizer, module.weight_quantizer
    if isinstance(weight, nn.Sequential) or weight.block_sizes or inputs.block_sizes:
        return False
    if getattr(inputs, "_amax", None) is None or not weight.is_enabled:
        return False
    if weight.num_bits == inputs.num_bits == (4, 3):
        return True
    smoothed = inputs.pre_quant_scale is not None
    return bool(smoothed and weight.num_bits == inputs.num_bits == 8)
