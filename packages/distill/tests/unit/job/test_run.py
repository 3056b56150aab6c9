"""One whole job on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from slimtron_common.manifest import verify_manifest
from slimtron_common.report import read_report
from slimtron_distill.__main__ import main
from slimtron_distill.job.config import DistillJobConfig
from slimtron_distill.training.log import read_log

Arguments = Callable[..., list[str]]


def test_a_student_comes_closer_to_its_teacher_and_is_what_transformers_reads(
    arguments: Arguments, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = arguments("run", "--steps", "24", "--save-interval", "10", "--seq-len", "32")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "student distilled from teacher" in shown
    assert verify_manifest(out).kind == "distilled"
    teacher, start, distilled = read_report(out).columns
    assert teacher.metrics["kl"] == 0
    assert start.metrics["kl"] > distilled.metrics["kl"] > 0  # type: ignore[operator]

    records = read_log(out / "train.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 25))
    assert sum(r["loss"] for r in steps[:4]) > sum(r["loss"] for r in steps[-4:])
    assert {r["step"] for r in records if "validation_kl" in r} == {4, 8, 12, 16, 20}

    # The report's number for the student, by transformers, on the text that was held out.
    text = _held_out(tiny_teacher)
    found = _perplexity(out, text)
    assert found == pytest.approx(distilled.metrics["perplexity"], rel=1e-4)
    assert _perplexity(tiny_teacher, text) == pytest.approx(teacher.metrics["perplexity"], rel=1e-4)

    assert main(["verify", str(out), "--eval-tokens", "64", "--eval-seq-len", "16"]) == 0
    assert "is sound" in capsys.readouterr().out
    # A finished run has nothing to go on with, and says so by doing nothing.
    before = (out / "slimtron.json").read_bytes()
    assert main([*command, "--resume"]) == 0
    assert (out / "slimtron.json").read_bytes() == before
    (out / "config.json").write_text("{}")
    assert main(["verify", str(out)]) == 2


def _held_out(model: Path) -> torch.Tensor:
    from slimtron_common.data import DataConfig, token_dataset

    data = DataConfig(source="pydoc", num_tokens=64, seq_length=16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return torch.from_numpy(token_dataset(data, tokenizer).tokens)


def _perplexity(directory: Path, tokens: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


def test_the_shipped_example_is_a_valid_job() -> None:
    from slimtron_common.config import build_config

    example = Path(__file__).parents[5] / "examples/distill/smollm2.yaml"
    config = build_config(DistillJobConfig, file=example)
    assert config.evaluation.source is None
