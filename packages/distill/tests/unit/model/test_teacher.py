"""A teacher from NeMo's config of it and a distributed checkpoint, without NeMo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import CheckpointError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_distill import teacher_provider


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher"
    return write_tiny_model(path, num_hidden_layers=2, tokenizer=False)


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def _config(path: Path, context: ParallelContext) -> Any:
    """Stands for ``llm.GPTConfig``: what builds the model."""
    architecture = open_checkpoint(f"hf:{path}").architecture

    def configure_model(tokenizer: object) -> Any:
        model = build_model(architecture, context, dtype=torch.float32)
        return model.requires_grad_(True).train()

    return SimpleNamespace(configure_model=configure_model, sequence_parallel=False)


def _loaded(path: Path, context: ParallelContext) -> Any:
    checkpoint = open_checkpoint(f"hf:{path}")
    model = build_model(checkpoint.architecture, context, dtype=torch.float32)
    checkpoint.load(model, context)
    return model


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_checkpoints_of_nemo_and_megatron(
    prefix: str, path: Path, tmp_path: Path, context: ParallelContext
) -> None:
    expected = _loaded(path, context)
    weights = tmp_path / "weights" if prefix else tmp_path
    weights.mkdir(exist_ok=True)
    dist_checkpointing.save(expected.sharded_state_dict(prefix=prefix), str(weights))
    teacher = teacher_provider(_config(path, context), str(tmp_path), None, None)
    assert not teacher.training
    for name, parameter in expected.named_parameters():
        found = teacher.get_parameter(name)
        assert torch.equal(found, parameter)
        assert not found.requires_grad


def test_a_hugging_face_directory(path: Path, context: ParallelContext) -> None:
    teacher = teacher_provider(_config(path, context), f"hf:{path}", None)
    expected = _loaded(path, context)
    for name, parameter in expected.named_parameters():
        assert torch.equal(teacher.get_parameter(name), parameter)


def test_what_is_no_checkpoint(path: Path, tmp_path: Path, context: ParallelContext) -> None:
    with pytest.raises(CheckpointError, match="index of the distributed checkpoint is missing"):
        teacher_provider(_config(path, context), tmp_path, None)
    other = _loaded(path, context)
    sharded = other.sharded_state_dict()
    del sharded["decoder.final_layernorm.weight"]
    dist_checkpointing.save(sharded, str(tmp_path))
    with pytest.raises(CheckpointError, match="not those of this model"):
        teacher_provider(_config(path, context), tmp_path, None)
