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


SINGLE = ParallelConfig()
TENSOR = ParallelConfig(tensor_parallel_size=2)
PIPELINE = ParallelConfig(pipeline_parallel_size=2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "layouts", [(TENSOR, PIPELINE), (SINGLE, TENSOR)], ids=["tp2, then pp2", "alone, then tp2"]
)
def test_there_and_back_in_another_layout(
    layouts: tuple[ParallelConfig, ParallelConfig], tied: bool, tmp_path: Path
) -> None:
    # Two tensor-parallel processes pad an odd vocabulary.
    original = write_tiny_model(
        tmp_path / "original", "qwen2", tie_word_embeddings=tied, vocab_size=299, tokenizer=False
    )
    there, back = tmp_path / "there", tmp_path / "back"
    for layout, source, target in (
        (layouts[0], f"hf:{original}", f"megatron:{there}"),
        (layouts[1], f"megatron:{there}", f"hf:{back}"),
    ):
        first, *others = run_ranks(_convert, layout.model_parallel_size, source, target, layout)
        assert all(other == first for other in others), "the same on every process"
        assert first.difference == 0.0
        assert first.largest_logit > 1
        verify_manifest(first.path)
    before = load_file(original / "model.safetensors")
    # Every pipeline stage writes a file of its own.
    after = {}
    for file in sorted(back.glob("*.safetensors")):
        after.update(load_file(file))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
