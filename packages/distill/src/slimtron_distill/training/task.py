"""What is trained, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict

from torch import Tensor, nn

__all__ = ["Batch", "LossFunction", "Losses", "Task"]


class Batch(TypedDict):
    """One micro-batch, on the device, the same on all processes of a model replica."""

    tokens: Tensor
    """``[b, s]``, int64."""

    labels: Tensor
    """``[b, s]``, int64: the token that follows each of ``tokens``."""

    loss_mask: Tensor
    """``[b, s]``, float32: 1 where a token counts, 0 where it does not."""

    rows: Tensor
    """``[b]``, int64, on the CPU: which of the training text's sequences they are."""


Losses: TypeAlias = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Sum of the loss over the tokens that count (differentiable, float32), their number (int32), and
for the logs ``[sum, count]`` of each named part, detached float32. As Megatron's schedules take it
with ``calculate_per_token_loss=True``, each of them over this data-parallel process alone."""

LossFunction: TypeAlias = Callable[[Any], Losses]


class Task(Protocol):
    """A model to train, with its forward step and loss."""

    chunks: Sequence[nn.Module]
    """This process's virtual pipeline stages (``MegatronModule``): what Megatron's data parallel
    wraps. Parameters that need no gradient (a teacher's) are not trained."""

    student_chunks: Sequence[nn.Module]
    """The part of each chunk that is the student (``GPTModel``)."""

    adjust_tensor_shapes_fn: Callable[..., Any] | None
    """For Megatron's pipeline schedule, where stages send more than one hidden state."""

    def forward_step(self, iterator: Iterator[Any], model: nn.Module) -> tuple[Any, LossFunction]:
        """Runs the next ``Batch`` through ``model``, one of ``chunks`` in its wrapper.

        Returns:
            What Megatron passes on to the next stage, and the loss of it on the last stage.
        """
        ...

    def collect(self, losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Adds up the micro-batches' named parts; every process calls it after the schedule.

        Args:
            losses: The last stage's of this step; nothing on other stages.

        Returns:
            ``[sum, count]`` of each named loss, ``loss`` among them, which is minimized; of this
            data-parallel process alone, the same on all processes of its model replica.
        """
        ...

    def observe(self, losses: Mapping[str, float]) -> None:
        """Takes the means of the step that is done: the same on every process."""

    def state_dict(self) -> dict[str, Any]:
        """What goes on from step to step beside the weights: JSON values, the same everywhere."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""

    def extra_parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained on this process beside the student.

        Returns:
            Parameters by names that no other layout changes, each whole, and the same, on all
            tensor-parallel processes of its stage.
        """
        ...
