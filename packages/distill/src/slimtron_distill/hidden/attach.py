"""Let a loss that arises in the middle of a model take part in the backward pass.

Megatron's schedules call a loss function on the last pipeline stage alone. A loss of another
stage rides on the hidden state that the stage passes on: backward through the hidden state is
also backward through the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attach_loss"]


def attach_loss(
    hidden: Tensor, loss: Tensor, gradient_scale: Callable[[], Tensor | None]
) -> Tensor:
    """Ties a loss to a tensor.

    Args:
        hidden: Any tensor on the way to the final loss.
        loss: A scalar. It counts in the total as it is.
        gradient_scale: Called in the backward pass: the factor by which the final loss was
            multiplied to keep half-precision gradients in range, or None.

    Returns:
        ``hidden``; its gradient is unchanged.
    """
    result: Tensor = _Attach.apply(hidden, loss, gradient_scale)  # type: ignore[no-untyped-call]
    return result


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, loss: Tensor, gradient_scale: Callable[[], Tensor | None]
    ) -> Tensor:
        ctx.gradient_scale = gradient_scale
        ctx.save_for_backward(loss)
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        scale = ctx.gradient_scale()
        ones = torch.ones_like(loss)
        return gradient, ones if scale is None else ones * scale.reshape(()), None
