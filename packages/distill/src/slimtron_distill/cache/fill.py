"""Compute what of a cache is missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimtron_common.data import TokenDataset
from slimtron_common.parallel import ParallelContext, forward_only
from slimtron_common.progress import Progress
from slimtron_distill.cache.store import TeacherCache
from slimtron_distill.losses import teacher_top_k

__all__ = ["fill_cache"]


def fill_cache(
    cache: TeacherCache,
    teacher: Sequence[nn.Module],
    dataset: TokenDataset,
    context: ParallelContext,
    *,
    micro_batch_size: int,
) -> None:
    """Runs the teacher over the sequences whose shards are missing; all processes call it.

    The copies of the teacher share the shards out. A run that is interrupted keeps those that are
    finished.

    Args:
        cache: The cache, with what is in it.
        teacher: Its virtual pipeline chunks, or the one model.
        dataset: Sequences one token longer than the cache's.
        context: This process's place.
        micro_batch_size: Sequences in a forward pass.
    """
    missing = cache.missing()
    context.barrier()
    own = missing[context.dp_rank :: context.dp_size]
    with Progress("cache the teacher's logits", len(own)) as progress:
        for shard in own:
            tokens = torch.from_numpy(dataset.tokens[cache.rows(shard), :-1])
            parts = _top_k(cache, teacher, torch.split(tokens, micro_batch_size), context)
            if context.is_last_stage and context.tp_rank == 0:
                indices, logits = (torch.cat(part) for part in zip(*parts, strict=True))
                cache.write(shard, indices, logits)
            progress.advance()
    context.barrier()


def _top_k(
    cache: TeacherCache,
    teacher: Sequence[nn.Module],
    batches: Sequence[Tensor],
    context: ParallelContext,
) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: int, logits: Tensor) -> None:
        indices, largest = teacher_top_k(
            logits,
            cache.identity["top_k"],
            group=context.tp_group,
            vocab_size=cache.identity["vocab_size"],
        )
        found.append((indices.cpu(), largest.cpu()))

    forward_only(list(teacher), batches, context, keep)
    return found
