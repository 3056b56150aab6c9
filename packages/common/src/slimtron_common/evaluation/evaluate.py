"""Perplexity, and distance to a recorded reference, at any parallel layout."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from slimtron_common.evaluation.metrics import (
    MetricAccumulator,
    vocab_parallel_argmax,
    vocab_parallel_kl,
    vocab_parallel_token_nll,
)
from slimtron_common.evaluation.reference import ReferenceReader, ReferenceWriter
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.context_parallel import local_positions
from slimtron_common.parallel.schedule import forward_only
from slimtron_common.progress import Progress

__all__ = ["Distance", "Evaluation", "evaluate", "rank_key"]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a model's predictions are from a reference's."""

    kl: float
    """Mean Kullback-Leibler divergence from the reference to the model, nats per token."""

    agreement: float
    """Fraction of tokens for which both find the same token likeliest."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model measured on held-out text."""

    perplexity: float
    loss: float
    """Mean negative log-likelihood, nats per token."""

    num_tokens: int
    """Tokens predicted."""

    distances: Mapping[str, Distance]
    """By the name of the reference."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Reads ``to_dict``'s output."""
        distances = {name: Distance(**d) for name, d in data["distances"].items()}
        return cls(**{**data, "distances": distances})


def evaluate(
    model: Any,
    batches: Sequence[torch.Tensor],
    context: ParallelContext,
    *,
    vocab_size: int,
    references: Mapping[str, Path] = MappingProxyType({}),
    record: Path | None = None,
    description: str = "evaluate",
) -> Evaluation:
    """Measures a model on token sequences, each token predicted from those before it.

    The full logits are never gathered: every process works on its vocabulary shard.

    Args:
        model: A Megatron-Core model or what holds it.
        batches: This data-parallel rank's token ids, each ``[b, s]``.
        context: This process's place.
        vocab_size: True vocabulary; logits of the padding beyond it are ignored.
        references: Directories that ``record`` filled with other models' logits on the same
            batches in the same layout, by name.
        record: An existing directory to record this model's logits in.
        description: What the progress display says.

    Returns:
        The same on every process.
    """
    counts = MetricAccumulator(context.device)
    distances = {name: MetricAccumulator(context.device) for name in references}
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(description, len(batches)))
        readers, writer = {}, None
        if context.is_last_stage:
            key = rank_key(context)
            readers = {name: ReferenceReader(path, key) for name, path in references.items()}
            if record is not None:
                writer = stack.enter_context(ReferenceWriter(record, key))

        def on_logits(index: int, logits: torch.Tensor) -> None:
            start, group = context.tp_rank * logits.shape[-1], context.tp_group
            # Logits of the padded vocabulary must not take part in any softmax.
            logits[..., max(0, vocab_size - start) :] = float("-inf")
            if writer is not None:
                writer.append(logits)
            whole = batches[index]
            positions = local_positions(whole.shape[1], context.cp_rank, context.cp_size)
            # Nothing follows the last token.
            positions = positions[positions < whole.shape[1] - 1]
            predicted = logits[:, : len(positions)]
            targets = whole[:, positions + 1].to(logits.device)
            nll = vocab_parallel_token_nll(predicted, targets, start, group)
            counts.update(nll)
            if readers:
                likeliest = vocab_parallel_argmax(predicted, start, group)
            for name, reader in readers.items():
                original = reader.read(index, like=logits)[:, : len(positions)]
                same = vocab_parallel_argmax(original, start, group) == likeliest
                distances[name].update(nll, vocab_parallel_kl(original, predicted, group), same)
            progress.advance()

        forward_only(model, batches, context, on_logits)
    for accumulator in (counts, *distances.values()):
        accumulator.reduce(context.dp_cp_group)
        # Only the last stage has counted anything: the sum over stages hands it to all.
        accumulator.reduce(context.pp_group)
    return Evaluation(
        perplexity=_measured(counts, "perplexity"),
        loss=_measured(counts, "loss"),
        num_tokens=int(_measured(counts, "num_tokens")),
        distances={
            name: Distance(kl=_measured(found, "kl"), agreement=_measured(found, "agreement"))
            for name, found in distances.items()
        },
    )


def _measured(accumulator: MetricAccumulator, name: str) -> float:
    value = accumulator.result()[name]
    assert value is not None, "no batch, no token"
    return value


def rank_key(context: ParallelContext) -> str:
    """Names the shard of recorded logits that belongs to this process."""
    return f"tp{context.tp_rank}-cp{context.cp_rank}-dp{context.dp_rank}"
