"""Walk a model forward over batches through Megatron's own pipeline schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from slimtron_common.errors import ParallelismError
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.context_parallel import cut_over_context
from slimtron_common.parallel.unwrap import unwrap_chunks

__all__ = ["LayeredModel", "OnLogits", "forward_only", "model_inputs"]

OnLogits = Callable[[int, torch.Tensor], None]


class LayeredModel(ABC):
    """A model that is never whole in memory; ``forward_only`` takes it as any other."""

    @abstractmethod
    def layers(self) -> Iterator[nn.Module]:
        """Yields each layer as a pipeline stage of its own; let go of one before the next."""

    @abstractmethod
    def forward_only(
        self,
        batches: Sequence[torch.Tensor],
        context: ParallelContext,
        on_logits: OnLogits | None = None,
    ) -> None:
        """Runs every batch through the model, as the function of this name does."""


@torch.no_grad()
def forward_only(
    model: Any,
    batches: Sequence[torch.Tensor],
    context: ParallelContext,
    on_logits: OnLogits | None = None,
) -> None:
    """Runs every batch through the whole model, at any pipeline size, without gradients.

    All ranks of a model replica pass the same batches. Batches of one shape form one run of
    the schedule, because a pipeline's receive buffers have one shape a run; a shorter last
    batch becomes a run of its own, so nothing is padded or dropped.

    Args:
        model: A Megatron-Core model or what holds it, or a ``LayeredModel``; its mode (train or
            eval) is kept.
        batches: Token ids, each ``[b, s]`` int64.
        context: This process's place.
        on_logits: Called on the last pipeline stage as ``on_logits(index, logits)``, with the
            index into ``batches`` and logits ``[b, s/cp, v/tp]``, of the tokens that
            ``cut_over_context`` gives this process.

    Raises:
        ParallelismError: Processes that share experts out pass different numbers of batches.
    """
    _check_counts(len(batches), context)
    if isinstance(model, LayeredModel):
        model.forward_only(batches, context, on_logits)
        return
    chunks = unwrap_chunks(model)
    run = get_forward_backward_func()
    for shape, group in groupby(enumerate(batches), key=lambda item: item[1].shape):
        items = list(group)
        micro_batch_size, seq_length = shape
        iterators = [_feed(items, context.device) for _ in chunks]
        run(
            forward_step_func=_forward_step(context, on_logits),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(items),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=seq_length,
            forward_only=True,
        )


def _check_counts(num_batches: int, context: ParallelContext) -> None:
    """In every layer a process waits for those that hold other experts of its model."""
    if context.ep_size == 1:
        return
    counts = [0] * context.ep_size
    dist.all_gather_object(counts, num_batches, group=context.ep_group)
    if len(set(counts)) > 1:
        raise ParallelismError(
            "processes that share experts out need equally many batches each",
            where="parallel.expert_parallel_size",
            found=", ".join(map(str, counts)),
            hint="take a number of sequences that the data-parallel processes divide",
        )


def _feed(
    items: list[tuple[int, torch.Tensor]], device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    for index, tokens in items:
        yield index, tokens.to(device, non_blocking=True)


def model_inputs(
    tokens: torch.Tensor, context: ParallelContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns this process's tokens of a batch and their positions, each ``[b, s/cp]``.

    Args:
        tokens: ``[b, s]``, on the process's device.
        context: Its place.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    rank, size = context.cp_rank, context.cp_size
    return cut_over_context(tokens, rank, size), cut_over_context(positions, rank, size)


def _forward_step(context: ParallelContext, on_logits: OnLogits | None) -> Callable[..., Any]:
    def step(iterator: Iterator[tuple[int, torch.Tensor]], model: Any) -> tuple[Any, Any]:
        index, tokens = next(iterator)
        output = model(*model_inputs(tokens, context), None)

        def finish(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            if on_logits is not None:
                on_logits(index, logits)
            return logits.new_zeros(1), {}

        return output, finish

    return step
