"""What the processes of tests start with, two tiny models, and the command's arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slimtron_common.testing import ranks, write_tiny_model

ranks.PRELOADED += [
    "slimtron_distill.job.run",
    "slimtron_distill.model.task",
    "slimtron_distill.training.trainer",
]


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with a tokenizer; do not change it."""
    path = tmp_path_factory.mktemp("models") / "teacher"
    return write_tiny_model(path, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrower Llama with other weights and the same tokenizer; do not change it."""
    path = tmp_path_factory.mktemp("models") / "student"
    return write_tiny_model(path, tie_word_embeddings=True, hidden_size=48, seed=1)


@pytest.fixture
def arguments(tiny_student: Path, tiny_teacher: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short job of ``run`` or ``plan``; later ones win."""

    def build(command: str = "run", *more: str, out: Path = tmp_path / "out") -> list[str]:
        return [
            *(command, "--student", f"hf:{tiny_student}", "--teacher", f"hf:{tiny_teacher}"),
            *("--out", str(out), "--data", "pydoc", "--steps", "8", "--warmup-steps", "2"),
            *("--global-batch-size", "4", "--micro-batch-size", "2", "--seq-len", "16"),
            *("--lr", "1e-3", "--eval-tokens", "64", "--eval-seq-len", "16"),
            *("--eval-interval", "4", "--save-interval", "2", "--device", "cpu", *more),
        ]

    return build
