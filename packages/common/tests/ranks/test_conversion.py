"""Checkpoints travel between layouts unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimtron_common.conversion import Conversion, convert, plan_conversion
from slimtron_common.manifest import verify_manifest
from slimtron_common.parallel import ParallelConfig
from slimtron_common.testing import run_ranks, write_tiny_model


def _convert(
    rank: int, world_size: int, source: str, target: str, layout: ParallelConfig
) -> Conversion:
    return convert(plan_conversion(source, target, parallel=layout, device="cpu"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tensor_parallel_there_and_pipeline_back(tied: bool, tmp_path: Path) -> None:
    original = write_tiny_model(
        tmp_path / "original", "qwen2", tie_word_embeddings=tied, vocab_size=299, tokenizer=False
    )
    there, back = tmp_path / "there", tmp_path / "back"
    tensor, pipeline = (
        ParallelConfig(tensor_parallel_size=2),
        ParallelConfig(pipeline_parallel_size=2),
    )
    results = [
        run_ranks(_convert, 2, f"hf:{original}", f"megatron:{there}", tensor),
        run_ranks(_convert, 2, f"megatron:{there}", f"hf:{back}", pipeline),
    ]
    for first, second in results:
        assert first == second, "the same on every process"
        assert first.difference == 0.0
        assert first.largest_logit > 1
        verify_manifest(first.path)
    before = load_file(original / "model.safetensors")
    # Every stage writes a file of its own.
    after = {}
    for file in sorted(back.glob("*.safetensors")):
        after.update(load_file(file))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
