"""The loss over the entries of the vocabulary that the teacher holds likeliest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from slimtron_common.errors import ConfigError
from slimtron_distill.losses.kd import kd_loss
from slimtron_distill.losses.settings import Implementation, LogitLossSettings
from slimtron_distill.losses.shards import LogitShards
from slimtron_distill.losses.statistics import gather_parts

__all__ = ["kd_loss_from_top_k", "teacher_top_k"]

_BLOCK_ELEMENTS = 2**25
"""Logits in a block: their sort keys take 256 MiB."""

_INDEX_BITS = 32


@torch.no_grad()
def teacher_top_k(
    teacher_logits: Tensor,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds each token's largest logits over the whole vocabulary.

    Of equal logits the one with the lower index comes first, so that the choice does not depend
    on device, tensor-parallel size or chance.

    Args:
        teacher_logits: ``[s, b, v/tp]`` or ``[n, v/tp]``, bf16, fp16 or fp32.
        k: How many.
        group: The tensor-parallel group; None when the vocabulary is whole.
        vocab_size: Entries of the whole vocabulary without padding; None if there is none.

    Returns:
        Indices into the whole vocabulary, int64, and logits in the teacher's dtype, both
        ``[s, b, k]`` (``[n, k]``) from the largest down, the same on every process.

    Raises:
        ConfigError: The vocabulary has fewer than ``k`` entries.
    """
    shards = LogitShards.check(teacher_logits, teacher_logits, group=group, vocab_size=vocab_size)
    size, rank = (1, 0) if shards.group is None else (shards.group.size(), shards.group.rank())
    width = teacher_logits.shape[-1]
    if k > (size * width if vocab_size is None else vocab_size):
        raise ConfigError(
            "more entries are asked for than the vocabulary has",
            where="top_k",
            found=k,
            allowed=f"at most {size * width if vocab_size is None else vocab_size}",
        )
    index = torch.arange(width, device=teacher_logits.device) + rank * width
    keys = index.new_full((*shards.teacher.shape[:2], min(k, width)), torch.iinfo(torch.int64).min)
    num_local = min(k, shards.num_columns)
    if num_local:
        for where in shards.pieces(_BLOCK_ELEMENTS):
            columns = slice(shards.num_columns)
            block = _sort_keys(shards.teacher[(*where, columns)], index[columns])
            keys[(*where, slice(num_local))] = block.topk(num_local, sorted=True).values
    if shards.group is not None:
        keys = torch.cat(gather_parts(keys, shards.group).unbind(), dim=-1).topk(k).values
    indices, logits = _from_sort_keys(keys, teacher_logits.dtype)
    shape = (*teacher_logits.shape[:-1], k)
    return indices.reshape(shape), logits.reshape(shape)


def kd_loss_from_top_k(
    student_logits: Tensor,
    indices: Tensor,
    teacher_top_k_logits: Tensor,
    settings: LogitLossSettings,
    *,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    """`kd_loss` over given entries of the vocabulary, as a teacher's cache holds them.

    Student and teacher are both renormalized over the entries of a token, as in ModelOpt's
    ``TopKLogitsKLLoss``. Entries where the teacher has ``-inf`` do not count.

    Args:
        student_logits: ``[s, b, v/tp]`` or ``[n, v/tp]``.
        indices: ``[s, b, k]`` (``[n, k]``) integer, indices into the whole vocabulary.
        teacher_top_k_logits: The teacher's logits there, of the same shape.
        settings: What to compute; its ``top_k`` must be ``k`` or None.
        weights: As in `kd_loss`.
        group: As in `kd_loss`.
        vocab_size: As in `kd_loss`.
        inplace: As in `kd_loss`.
        implementation: As in `kd_loss`.

    Returns:
        Scalar fp32, the same on every process of the group.

    Raises:
        ConfigError: Shapes do not fit each other, or ``settings.top_k`` is another ``k``.
    """
    shape = (*student_logits.shape[:-1], indices.shape[-1])
    if indices.shape != shape or teacher_top_k_logits.shape != shape:
        raise ConfigError(
            "the teacher's entries are not of the student's tokens",
            where="indices",
            found=f"{list(indices.shape)} with logits {list(teacher_top_k_logits.shape)}",
            allowed=[*student_logits.shape[:-1], "k"],
        )
    if settings.top_k not in (None, shape[-1]):
        raise ConfigError(
            "the teacher's entries are not as many as the loss is set to",
            where="top_k",
            found=settings.top_k,
            allowed=shape[-1],
        )
    shards = LogitShards.check(student_logits, student_logits, group=group, vocab_size=vocab_size)
    rank = 0 if shards.group is None else shards.group.rank()
    local = indices.long() - rank * student_logits.shape[-1]
    is_local = (local >= 0) & (local < shards.num_columns)
    selected: Tensor = _Select.apply(  # type: ignore[no-untyped-call]
        student_logits, torch.where(is_local, local, 0), is_local, inplace
    )
    if shards.group is not None:
        from slimtron_common.parallel.collectives import sum_over_group

        selected = sum_over_group(selected, shards.group)
    selected = selected.masked_fill(teacher_top_k_logits == -torch.inf, -torch.inf)
    return kd_loss(
        selected,
        teacher_top_k_logits,
        replace(settings, top_k=None),
        weights=weights,
        implementation=implementation,
    )


class _Select(torch.autograd.Function):
    """Picks logits out of the local shard, in fp32; 0 where it does not hold them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, local: Tensor, is_local: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(logits, local, is_local)
        ctx.inplace = inplace
        selected = logits.gather(-1, local)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return torch.where(is_local, selected.to(dtype), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, selected_gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, is_local = ctx.saved_tensors
        values = torch.where(is_local, selected_gradient, 0.0).to(logits.dtype)
        gradient = logits.detach() if ctx.inplace else torch.empty_like(logits)
        gradient.zero_()
        # Entries that this process does not hold all point at column 0: they must not overwrite.
        gradient.scatter_add_(-1, local, values)
        if ctx.inplace:
            increment_version(logits)
        return gradient, None, None, None


def _sort_keys(logits: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of the logits, then of falling index: ``[s, b, v]`` int64."""
    # Adding 0 makes -0.0 the same as 0.0.
    bits = (logits.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys: Tensor = (ordered << _INDEX_BITS) | (2**_INDEX_BITS - 1 - index)
    return keys


def _from_sort_keys(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    index = 2**_INDEX_BITS - 1 - (keys & (2**_INDEX_BITS - 1))
    ordered = (keys >> _INDEX_BITS).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return index, bits.view(torch.float32).to(dtype)
