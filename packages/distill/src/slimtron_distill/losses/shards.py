"""The student's and the teacher's logits of the same tokens, checked against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from slimtron_common.errors import ConfigError, ParallelismError

__all__ = ["LogitShards", "three_dimensional", "token_weights"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitShards:
    """One process's part of the vocabulary, of student and teacher.

    The logits are ``[s, b, v/tp]`` views; two-dimensional ones have got ``b = 1``.
    """

    student: Tensor
    teacher: Tensor
    num_columns: int
    """Leading columns that hold entries of the vocabulary; what follows is padding."""

    group: dist.ProcessGroup | None
    """The processes that hold the other parts; None if there are none."""

    @classmethod
    def check(
        cls,
        student: Tensor,
        teacher: Tensor,
        *,
        group: dist.ProcessGroup | None,
        vocab_size: int | None,
    ) -> LogitShards:
        """Pairs logits that belong together.

        Args:
            student: ``[s, b, v/tp]`` or ``[n, v/tp]`` floating.
            teacher: The same tokens; its last dimension may be padded to another width.
            group: The tensor-parallel group, None for a whole vocabulary.
            vocab_size: Entries of the whole vocabulary without padding; None if there is none.

        Raises:
            ConfigError: Shapes, dtypes or devices do not fit each other.
            ParallelismError: The shards of the two do not hold the same part of the vocabulary.
        """
        if student.dim() not in (2, 3) or student.shape[:-1] != teacher.shape[:-1]:
            raise ConfigError(
                "student and teacher logits are not of the same tokens",
                where="teacher_logits",
                found=f"{list(teacher.shape)} beside the student's {list(student.shape)}",
                allowed="[s, b, v/tp] or [n, v/tp], alike but for the last dimension",
            )
        for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
            if logits.dtype not in _DTYPES or logits.device != student.device:
                raise ConfigError(
                    "these logits cannot be compared",
                    where=name,
                    found=f"{logits.dtype} on {logits.device}",
                    allowed=f"floating, on {student.device}",
                )
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        widths = student.shape[-1], teacher.shape[-1]
        if widths[0] != widths[1] and (vocab_size is None or vocab_size > min(widths)):
            found = f"{widths[0]} columns of the student's, {widths[1]} of the teacher's"
            if size == 1:
                raise ConfigError(
                    "student and teacher differ in vocabulary",
                    where="vocab_size",
                    found=f"{found}, vocab_size {vocab_size}",
                    allowed=f"at most {min(widths)}, the entries that both have",
                )
            raise ParallelismError(
                "the processes hold different parts of the student's and the teacher's vocabulary",
                where=f"rank {rank} of {size}",
                found=found,
                hint="pad both vocabularies to the same size before they are cut",
            )
        width = min(widths)
        if vocab_size is not None and not 0 < vocab_size <= size * width:
            raise ConfigError(
                "no such vocabulary",
                where="vocab_size",
                found=vocab_size,
                allowed=f"1 to {size * width}, what the logits hold",
            )
        rest = width if vocab_size is None else vocab_size - rank * width
        return cls(
            student=three_dimensional(student.detach()),
            teacher=three_dimensional(teacher.detach()),
            num_columns=max(0, min(width, rest)),
            group=group if size > 1 else None,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """What sums are held in: fp32, or fp64 for fp64 logits."""
        return torch.float64 if self.student.dtype == torch.float64 else torch.float32

    def pieces(self, max_elements: int) -> Iterator[tuple[slice, slice]]:
        """Cuts the tokens into blocks ``[s, b]`` of at most so many logits (but one token)."""
        length, batch, _ = self.student.shape
        columns = max(1, self.num_columns)
        step_b = max(1, min(batch, max_elements // columns))
        step_s = max(1, max_elements // (columns * step_b))
        for s in range(0, length, step_s):
            for b in range(0, batch, step_b):
                yield slice(s, s + step_s), slice(b, b + step_b)


def token_weights(weights: Tensor | None, shards: LogitShards) -> Tensor:
    """The weight of every token: ``[s, b]`` in the compute dtype.

    Raises:
        ConfigError: The weights' shape is not that of the tokens.
    """
    shape = shards.student.shape[:-1]
    if weights is None:
        return torch.ones(shape, dtype=shards.compute_dtype, device=shards.student.device)
    if weights.numel() != shape.numel() or (weights.dim() == 2 and weights.shape != shape):
        raise ConfigError(
            "there is not one weight for each token",
            where="weights",
            found=list(weights.shape),
            allowed=list(shape),
        )
    return weights.detach().to(shards.student.device, shards.compute_dtype).reshape(shape)


def three_dimensional(logits: Tensor) -> Tensor:
    """``[s, b, v]`` as it is, ``[n, v]`` as ``[n, 1, v]``."""
    return logits if logits.dim() == 3 else logits.unsqueeze(1)
