"""One evaluation, whatever the layout, with a vocabulary that must be padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model

VOCAB_SIZE = 299
"""Odd: two processes pad it."""


def _evaluate(
    rank: int, world_size: int, paths: list[Path], layout: ParallelConfig, record: Path
) -> Evaluation:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB_SIZE, (5, 20), generator=generator)
    with initialize_parallel(layout, device="cpu") as context:
        batches = list(tokens[context.dp_rank :: context.dp_size].split(2))
        for number, path in enumerate(paths):
            checkpoint = open_checkpoint(f"hf:{path}")
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            found = evaluate(
                model,
                batches,
                context,
                vocab_size=VOCAB_SIZE,
                references={"first": record} if number else {},
                record=None if number else record,
            )
        return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny_model(folder / str(seed), seed=seed, vocab_size=VOCAB_SIZE, tokenizer=False)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def alone(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    record = tmp_path_factory.mktemp("record")
    (found,) = run_ranks(_evaluate, 1, paths, ParallelConfig(), record)
    return found


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        (ParallelConfig(tensor_parallel_size=2), 2),
        (ParallelConfig(pipeline_parallel_size=2), 2),
        (ParallelConfig(), 2),
        (ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2), 4),
    ],
    ids=["tp2", "pp2", "dp2", "tp2-pp2"],
)
def test_every_layout_measures_the_same(
    layout: ParallelConfig,
    world_size: int,
    paths: list[Path],
    alone: Evaluation,
    tmp_path: Path,
) -> None:
    results = run_ranks(_evaluate, world_size, paths, layout, tmp_path)
    for found in results:
        assert found == results[0], "the same on every process"
        assert found.num_tokens == alone.num_tokens == 5 * 19
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-4)
        assert found.distances["first"].kl == pytest.approx(alone.distances["first"].kl, rel=1e-4)
        assert found.distances["first"].agreement == alone.distances["first"].agreement
    assert alone.distances["first"].kl > 0.1
