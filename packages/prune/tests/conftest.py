"""One tiny model for all tests, and the command called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slimtron_common.models import Architecture
from slimtron_common.testing import ranks, write_tiny_model
from slimtron_common.testing.demo import demo_model_for_tests
from slimtron_prune.scoring.scores import Scores, score_shapes

ranks.PRELOADED += ["slimtron_prune.job.run", "slimtron_prune.pruner"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with a tokenizer; do not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def random_scores() -> Callable[[Architecture], Scores]:
    """Makes scores of any model, between 0 and 1, of 1000 tokens."""

    def make(architecture: Architecture) -> Scores:
        generator = torch.Generator().manual_seed(5)
        sums = {
            name: torch.rand(shape, generator=generator, dtype=torch.float64)
            for name, shape in score_shapes(architecture).items()
        }
        sums["num_tokens"].fill_(1000)
        return Scores(architecture, sums)

    return make


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short job of ``run`` or ``plan``; later ones win."""

    def build(command: str = "run", *more: str, out: Path = tmp_path / "out") -> list[str]:
        return [
            *(command, "--model", f"hf:{tiny_model}", "--out", str(out), "--data", "pydoc"),
            *("--score-tokens", "128", "--score-seq-len", "32", "--score-batch-size", "2"),
            *("--eval-tokens", "192", "--eval-seq-len", "32", "--eval-batch-size", "2"),
            *("--device", "cpu", *more),
        ]

    return build


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, real weights; do not change it."""
    return demo_model_for_tests(tmp_path_factory)
