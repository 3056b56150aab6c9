"""What is trained, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict

import torch
from torch import nn

__all__ = ["Batch", "LossFunction", "Losses", "Task"]


class Batch(TypedDict):
    """One micro-batch, on the device, the same on all processes of a model replica."""

    tokens: torch.Tensor
    """``[b, s]``, int64."""

    labels: torch.Tensor
    """``[b, s]``, int64: the token that follows each of ``tokens``."""

    loss_mask: torch.Tensor
    """``[b, s]``, float32: 1 where a token counts, 0 where it does not."""


Losses: TypeAlias = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""Sum of the loss over the tokens that count (differentiable, float32), their number (int), and
for the logs ``[sum, count]`` of each named part, detached float32. As Megatron's schedules take it
with ``calculate_per_token_loss=True``, each of them over this data-parallel process alone."""

LossFunction: TypeAlias = Callable[[torch.Tensor], Losses]


class Task(Protocol):
    """A model to train, with its forward step and loss."""

    chunks: Sequence[nn.Module]
    """This process's virtual pipeline stages (``MegatronModule``): what Megatron's data parallel
    wraps. Parameters that need no gradient (a teacher's) are not trained."""

    student_chunks: Sequence[nn.Module]
    """The part of each chunk that a checkpoint holds (``GPTModel``)."""

    adjust_tensor_shapes_fn: Callable[..., Any] | None
    """For Megatron's pipeline schedule, where stages send more than one hidden state."""

    def forward_step(
        self, iterator: Iterator[Batch], model: nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        """Runs the next micro-batch through ``model``, one of ``chunks`` in its wrapper.

        Returns:
            What Megatron passes on to the next stage, and the loss of it on the last stage.
        """
        ...
