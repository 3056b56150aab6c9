"""Checkpoints travel between layouts unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimtron_common.__main__ import main
from slimtron_common.conversion import Conversion, convert, plan_conversion
from slimtron_common.errors import ParallelismError
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.measure import measure, plan_evaluation
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
    kind = "nemo2" if tied else "megatron"
    for layout, source, target in (
        (layouts[0], f"hf:{original}", f"{kind}:{there}"),
        (layouts[1], f"{kind}:{there}", f"hf:{back}"),
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


def _share_experts_out(rank: int, world_size: int, folder: Path) -> list[float]:
    source, there, back = (
        f"hf:{folder / 'original'}",
        f"nemo2:{folder / 'there'}",
        folder / "back",
    )
    assert main(["convert", source, there, "--ep", "2", "--device", "cpu"]) == 0
    assert main(["convert", there, f"hf:{back}", "--tp", "2", "--device", "cpu"]) == 0
    text = EvaluationConfig(source="pydoc", num_tokens=128, seq_length=32)
    columns = []
    for layout in (TENSOR, ParallelConfig(expert_parallel_size=2)):
        plan = plan_evaluation(source, text, parallel=layout, device="cpu")
        columns += measure(plan).columns
    odd = EvaluationConfig(source="pydoc", num_tokens=96, seq_length=32)
    with pytest.raises(ParallelismError, match="as many sequences"):
        plan_evaluation(source, odd, parallel=layout, device="cpu")
    return [float(column.metrics["perplexity"] or 0) for column in columns]


def test_experts_are_shared_out_to_convert_and_to_measure(tmp_path: Path) -> None:
    original = write_tiny_model(tmp_path / "original", "mixtral", num_hidden_layers=2)
    ranks = run_ranks(_share_experts_out, 2, tmp_path)
    for tensor, expert in ranks:
        assert expert == pytest.approx(tensor, rel=1e-5)
    before, after = (load_file(p / "model.safetensors") for p in (original, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
