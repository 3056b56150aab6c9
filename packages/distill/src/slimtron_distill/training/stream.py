"""The micro-batches of every step: a function of the step, so that resuming needs no state."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from slimtron_common.data import TokenDataset
from slimtron_common.parallel import ParallelContext
from slimtron_distill.training.config import TrainingConfig
from slimtron_distill.training.task import Batch

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["BatchStream"]


class BatchStream:
    """Sequences in random order, epoch after epoch, dealt out to the data-parallel processes.

    Which sequences make up a step depends on the seed and the step alone, not on the layout.

    Args:
        dataset: Sequences one token longer than ``config.seq_length``, for the labels.
        config: How many of them make up a step.
        context: This process's place.
        seed: Seeds the order.
    """

    def __init__(
        self, dataset: TokenDataset, config: TrainingConfig, context: ParallelContext, *, seed: int
    ) -> None:
        self._tokens, self._config, self._context = dataset.tokens, config, context
        self._num_micro_batches = config.num_micro_batches(context.dp_size)
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(dataset.num_sequences)
        )

    def batches(self, step: int) -> list[Batch]:
        """This data-parallel process's micro-batches of one step, counted from 0."""
        size, dp_size = self._config.micro_batch_size, self._context.dp_size
        first = step * self._config.global_batch_size + self._context.dp_rank * size
        starts = range(first, first + self._num_micro_batches * dp_size * size, dp_size * size)
        return [self._batch(self._rows(start, size)) for start in starts]

    def _rows(self, start: int, count: int) -> npt.NDArray[np.int64]:
        places = [divmod(start + i, len(self._tokens)) for i in range(count)]
        return np.array([self._epoch(epoch)[index] for epoch, index in places], dtype=np.int64)

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        device = self._context.device
        sequences = torch.from_numpy(self._tokens[rows]).to(device)
        tokens, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        return Batch(
            tokens=tokens,
            labels=labels,
            loss_mask=torch.ones(labels.shape, device=device),
            rows=torch.from_numpy(rows),
        )
