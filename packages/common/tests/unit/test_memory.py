from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import ParallelismError
from slimtron_common.memory import (
    available_memory,
    check_memory,
    required_memory,
    shard_parameters,
)
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.testing import write_tiny_model

GIB = 2**30


def test_process_has_its_share_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_memory("cpu") == 12 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory("cpu") == 3 * GIB


def test_gpu_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((device + 1) * GIB, 80 * GIB))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory("cuda") == 3 * GIB


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"weights": 2.0 * GIB, "copy": 1.0 * GIB}
    needed = required_memory(parts.values())
    assert needed == pytest.approx(3.3 * GIB)
    monkeypatch.setattr("slimtron_common.memory.available_memory", lambda device: needed)
    check_memory(parts, "cpu", hint="wait")
    monkeypatch.setattr("slimtron_common.memory.available_memory", lambda device: needed - 1)
    with pytest.raises(ParallelismError, match="does not fit") as caught:
        check_memory(parts, "cpu", hint="wait")
    found = "3.3 GiB needed (weights 2.0, copy 1.0), 3.3 GiB free"
    assert (caught.value.where, caught.value.found, caught.value.hint) == ("host", found, "wait")
    with pytest.raises(ParallelismError, match="GPU"):
        check_memory(parts, "cuda", hint="wait")


@pytest.mark.parametrize("tied", [True, False])
def test_shard_of_the_only_process_is_the_model(tied: bool, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny", tie_word_embeddings=tied, tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{path}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert shard_parameters(checkpoint, ParallelConfig()) == built
    two_ways = ParallelConfig(tensor_parallel_size=2)
    assert shard_parameters(checkpoint, two_ways) == built / 2
    # Every stage has half of the layers, and one of them the embedding.
    embedding = 300 * checkpoint.architecture.hidden_size
    stages = ParallelConfig(pipeline_parallel_size=2)
    assert shard_parameters(checkpoint, stages) == (built - embedding) / 2 + embedding


def test_experts_are_shared_out(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny", "mixtral", tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{path}")
    experts = checkpoint.architecture.num_expert_parameters
    shared = ParallelConfig(expert_parallel_size=2)
    assert shard_parameters(checkpoint, shared) == checkpoint.num_parameters - experts / 2
