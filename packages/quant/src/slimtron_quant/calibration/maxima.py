"""The largest magnitudes of the activations, at the price of one read of each.

ModelOpt's collection takes several kernels and two waits for the GPU for every input, and looks
at the weights again in every forward pass. Here an input costs one reduction, the results stay
on the device until the text is over, and weights are looked at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.integrations.modelopt import rotates
from slimtron_quant.calibration.experts import share_maxima

__all__ = ["ForwardLoop", "collecting_maxima"]

ForwardLoop = Callable[[Any], None]
"""Runs calibration text through the model that it is given."""


def collecting_maxima(forward_loop: ForwardLoop) -> ForwardLoop:
    """Wraps a forward loop for ModelOpt's algorithms that begin with the largest magnitudes.

    Where a loop runs for another purpose, and where a quantizer collects something else (a
    histogram, blocks along the tokens), everything stays as it is.

    Args:
        forward_loop: Runs the text.

    Returns:
        A loop after which ModelOpt's calibrators hold what they would have collected, those of a
        mixture's experts what ``share_maxima`` makes of it. NaN and infinity are left for the
        check of the scales to find.
    """

    def loop(model: nn.Module) -> None:
        with _collected(model):
            forward_loop(model)

    return loop


@contextmanager
def _collected(model: nn.Module) -> Iterator[None]:
    collectors = [
        _Maximum(quantizer)
        for name, quantizer in _collecting_quantizers(model)
        if not _is_weight_quantizer(name) and _is_plain(quantizer)
    ]
    paused = [
        quantizer
        for name, quantizer in _collecting_quantizers(model)
        # ModelOpt has taken the weights' before the loop.
        if _is_weight_quantizer(name) and quantizer._calibrator.compute_amax() is not None
    ]
    paused += [collector.quantizer for collector in collectors]
    hooks = [
        collector.quantizer.register_forward_pre_hook(collector.observe) for collector in collectors
    ]
    for quantizer in paused:
        quantizer.disable_calib()
    try:
        yield
        for collector in collectors:
            collector.quantizer._calibrator._calib_amax = collector.largest
        maxima = ((collector.quantizer, collector.largest) for collector in collectors)
        for quantizer, shared in share_maxima(model, maxima):
            quantizer._calibrator._calib_amax = shared
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer in paused:
            quantizer.enable_calib()


class _Maximum:
    """What one quantizer's input has been at most: of the tensor, or of each channel."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        self.largest: Tensor | None = None

    @torch.no_grad()
    def observe(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        if not x.numel():
            return
        by_channel = self.quantizer._calibrator._axis is not None
        dims = tuple(range(x.dim() - 1)) if by_channel else None
        largest = torch.linalg.vector_norm(x, math.inf, dim=dims, keepdim=by_channel)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


def _collecting_quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from modelopt.torch.quantization.calib import MaxCalibrator
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name, module in model.named_modules():
        if (
            isinstance(module, TensorQuantizer)
            and not module._disabled
            and module._if_calib
            # A subclass collects something else.
            and type(module._calibrator) is MaxCalibrator
        ):
            yield name, module


def _is_weight_quantizer(name: str) -> bool:
    # Quantizers in sequence are numbered below it.
    return "weight_quantizer" in name.split(".")[-2:]


def _is_plain(quantizer: Any) -> bool:
    blocks = quantizer.block_sizes
    return (
        quantizer._calibrator._axis in (None, -1)
        and (blocks is None or blocks.get("type") == "dynamic")
        and quantizer.pre_quant_scale is None
        and not rotates(quantizer)
    )
