"""Perplexity, and distance to a recorded reference, at any parallel layout."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimtron_common.evaluation.metrics import MetricAccumulator
from slimtron_common.evaluation.reference import ReferenceReader, ReferenceWriter
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.schedule import forward_only
from slimtron_common.progress import Progress

__all__ = ["evaluate", "rank_key"]


def evaluate(
    model: Any,
    batches: Sequence[torch.Tensor],
    context: ParallelContext,
    *,
    vocab_size: int,
    reference: Path | None = None,
    record: Path | None = None,
    description: str = "evaluate",
) -> dict[str, float | int | None]:
    """Measures a model on token sequences, each token predicted from those before it.

    The full logits are never gathered: every process works on its vocabulary shard.

    Args:
        model: A Megatron-Core model or what holds it.
        batches: This data-parallel rank's token ids, each ``[b, s]``.
        context: This process's place.
        vocab_size: True vocabulary; logits of the padding beyond it are ignored.
        reference: A directory that ``record`` filled with another model's logits on the same
            batches in the same layout.
        record: A directory to record this model's logits in.
        description: What the progress display says.

    Returns:
        ``perplexity``, ``loss`` (nats per token), ``num_tokens``, and with a reference ``kl``
        (mean Kullback-Leibler divergence from the reference to this model, nats) and
        ``agreement`` (fraction of tokens with the same arg-max); the same on every process.
    """
    accumulator = MetricAccumulator(context.device)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(len(batches), description))
        reader = writer = None
        if context.is_last_stage and reference is not None:
            reader = iter(ReferenceReader(reference, rank_key(context)))
        if context.is_last_stage and record is not None:
            writer = stack.enter_context(ReferenceWriter(record, rank_key(context)))

        def on_logits(index: int, logits: torch.Tensor) -> None:
            start = context.tp_rank * logits.shape[-1]
            # Logits of the padded vocabulary must not take part in any softmax.
            logits[..., max(0, vocab_size - start) :] = float("-inf")
            if writer is not None:
                writer.append(logits)
            original = next(reader).to(logits.device)[:, :-1] if reader is not None else None
            accumulator.update(
                logits[:, :-1],
                batches[index][:, 1:].to(logits.device),
                vocab_start=start,
                group=context.tp_group,
                reference_logits=original,
            )
            progress.advance()

        forward_only(model, batches, context, on_logits)
    accumulator.reduce(context.dp_cp_group)
    # Only the last stage has counted anything: the sum over stages hands it to all.
    accumulator.reduce(context.pp_group)
    return accumulator.result()


def rank_key(context: ParallelContext) -> str:
    """Names the shard of recorded logits that belongs to this process."""
    return f"tp{context.tp_rank}-dp{context.dp_rank}"
