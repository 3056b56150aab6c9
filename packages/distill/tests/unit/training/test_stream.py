from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from slimtron_common.data import TokenDataset
from slimtron_common.errors import ConfigError
from slimtron_distill.training.config import TrainingConfig
from slimtron_distill.training.stream import BatchStream

DATASET = TokenDataset(np.arange(10 * 5, dtype=np.int64).reshape(10, 5))


@dataclass
class Place:
    dp_rank: int = 0
    dp_size: int = 1
    device: str = "cpu"


def stream(place: Any, micro_batch_size: int = 1, seed: int = 0) -> BatchStream:
    config = TrainingConfig(
        steps=10, seq_length=4, global_batch_size=4, micro_batch_size=micro_batch_size
    )
    return BatchStream(DATASET, config, place, seed=seed)


def rows(batches: list[Any]) -> list[int]:
    return [row for batch in batches for row in batch["rows"].tolist()]


def test_labels_are_the_tokens_that_follow() -> None:
    for batch in stream(Place(), micro_batch_size=2).batches(0):
        assert torch.equal(batch["tokens"], torch.from_numpy(DATASET.tokens)[batch["rows"], :4])
        assert torch.equal(batch["labels"], batch["tokens"] + 1)
        assert batch["loss_mask"].sum() == 8


def test_a_step_has_the_same_sequences_in_every_layout() -> None:
    for step in range(6):
        whole = sorted(rows(stream(Place()).batches(step)))
        for dp_size, size in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1)):
            shares = [stream(Place(rank, dp_size), size).batches(step) for rank in range(dp_size)]
            assert len({len(share) for share in shares}) == 1
            assert sorted(row for share in shares for row in rows(share)) == whole


def test_every_epoch_has_every_sequence_once_in_an_order_of_its_own() -> None:
    seen = [row for step in range(5) for row in rows(stream(Place()).batches(step))]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    other = [row for step in range(5) for row in rows(stream(Place(), seed=1).batches(step))]
    assert other != seen


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size") as caught:
        stream(Place(dp_size=3))
    assert "3 data-parallel processes" in str(caught.value)
