from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slimtron_common.evaluation.metrics import (
    MetricAccumulator,
    vocab_parallel_argmax,
    vocab_parallel_kl,
    vocab_parallel_token_nll,
)
from slimtron_common.testing import run_ranks

VOCAB = 24
SHAPE = (2, 9, VOCAB)


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Reference and model logits of the whole vocabulary, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(SHAPE, generator=generator) * 4
    logits = reference + torch.randn(SHAPE, generator=generator)
    padded_reference, padded = reference.clone(), logits.clone()
    padded_reference[..., 15:] = padded[..., 15:] = -torch.inf  # whole shards at 4 ranks
    one_hot = torch.full(SHAPE, -torch.inf)
    one_hot[..., 17] = 3.0
    return {
        "random": (reference, logits),
        "bfloat16": (reference.bfloat16(), logits.bfloat16()),
        "huge": (reference * 2e3, logits * 2e3),
        "equal": (torch.full(SHAPE, 7.0), torch.full(SHAPE, -7.0)),
        "padded": (padded_reference, padded),
        "one-hot": (one_hot, logits),
        "ties": (reference.round(), logits.round()),
    }


def check_shards(rank: int, world_size: int) -> list[str]:
    group = dist.group.WORLD
    width = VOCAB // world_size
    start = rank * width
    shard = slice(start, start + width)
    targets = torch.arange(18).view(2, 9) * 5 % 15
    for name, (reference, logits) in cases().items():
        p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        expected_nll = -q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        expected_kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)

        def same(actual: Tensor, expected: Tensor, name: str = name) -> None:
            # A few units in the last place of fp32, of the largest term in the sum.
            torch.testing.assert_close(
                actual.double(), expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}"
            )

        local = logits[..., shard]
        same(vocab_parallel_token_nll(local, targets, start, group), expected_nll)
        same(vocab_parallel_kl(reference[..., shard], local, group), expected_kl)
        argmax = vocab_parallel_argmax(local, start, group)
        assert torch.equal(argmax, logits.float().argmax(-1)), name
    absent = vocab_parallel_token_nll(logits[..., shard], targets - 100, start, group)
    assert absent.isnan().all()
    return list(cases())


def check_accumulator(rank: int, world_size: int) -> dict[str, float | int | None]:
    accumulator = MetricAccumulator()
    if rank > 0:  # rank 0 got no batch
        accumulator.update(
            torch.full((1, rank), float(rank)),
            kl=torch.full((1, rank), rank / 10),
            agreement=torch.arange(rank).view(1, rank) == 0,
        )
    accumulator.reduce(dist.group.WORLD)
    return accumulator.result()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_agree_with_the_whole_vocabulary(world_size: int) -> None:
    results = run_ranks(check_shards, world_size)
    assert len(results) == world_size
    assert all(names == list(cases()) for names in results)


def test_accumulator_sums_over_ranks() -> None:
    results = run_ranks(check_accumulator, 4)
    assert all(result == results[0] for result in results)
    loss = (1 + 4 + 9) / 6
    assert results[0] == {
        "perplexity": pytest.approx(math.exp(loss)),
        "loss": pytest.approx(loss),
        "kl": pytest.approx(loss / 10),
        "agreement": pytest.approx(3 / 6),
        "num_tokens": 6,
    }
