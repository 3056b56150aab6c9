"""Hidden states of student and teacher in the one tensor that crosses pipeline stages.

Megatron's schedules send one tensor a stage. In it lies the student's hidden state and then the
teacher's, each contiguous, so that taking them out copies nothing.

Legend: ``s`` sequence, ``b`` micro-batch, ``h`` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Packing"]


@dataclass(frozen=True, slots=True)
class Packing:
    """The shape of the tensor that holds both, as Megatron would describe a hidden state.

    The rows are those of the shorter sequence: where one model's is cut over the tensor-parallel
    processes and the other's is not, several rows of the latter share one.
    """

    student_width: int
    teacher_width: int
    student_rows: int = 1
    """Rows of the student's hidden state in one of the packed tensor."""
    teacher_rows: int = 1

    @classmethod
    def of(cls, student_config: Any, teacher_config: Any) -> Packing:
        """Derives it from two ``TransformerConfig``s of one parallel layout."""
        cuts = (student_config.sequence_parallel, teacher_config.sequence_parallel)
        rows = [
            student_config.tensor_model_parallel_size if any(cuts) and not cut else 1
            for cut in cuts
        ]
        return cls(student_config.hidden_size, teacher_config.hidden_size, *rows)

    @property
    def width(self) -> int:
        """Length of the packed tensor's last dimension."""
        return self.student_width * self.student_rows + self.teacher_width * self.teacher_rows

    def adjust(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The packed tensor's shape, from the student's hidden state's ``[s, b, h]``."""
        rows, batch, _ = shape
        return rows // self.student_rows, batch, self.width

    def pack(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Puts both together.

        Args:
            student: ``[s, b, h]``; gets the gradient.
            teacher: ``[s, b, h]``, with its own sizes.
        """
        shape = self.adjust(student.shape)
        packed: Tensor = _Pack.apply(student, teacher, shape)  # type: ignore[no-untyped-call]
        return packed

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both as views; only the student's carries a gradient."""
        rows, batch, _ = packed.shape
        student = (rows * self.student_rows, batch, self.student_width)
        teacher = (rows * self.teacher_rows, batch, self.teacher_width)
        flat = packed.view(-1)
        length = torch.Size(student).numel()
        return flat[:length].view(student), flat[length:].detach().view(teacher)


class _Pack(torch.autograd.Function):
    # The result must be no view: the schedule frees its memory once it is sent.
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = student.shape
        packed = student.new_empty(shape)
        flat = packed.view(-1)
        flat[: student.numel()].copy_(student.reshape(-1))
        flat[student.numel() :].copy_(teacher.reshape(-1))
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        flat = gradient.reshape(-1)
        return flat[: ctx.shape.numel()].view(ctx.shape), None, None
