"""What is refused before any weight loads, and what the message says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slimtron_common.testing import write_tiny_model
from slimtron_distill.__main__ import main

Arguments = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--global-batch-size", "3"], ["training.global_batch_size", "micro_batch_size 2"]),
        (["--warmup-steps", "8"], ["optimizer.warmup_steps", "below training.steps 8"]),
        (["--steps", "0"], ["training.steps", "1 or more"]),
        (["--lr", "1e-6"], ["optimizer.lr", "min_lr"]),
        (["--seq-len", "1024"], ["training.seq_length", "at most 512"]),
        (["--eval-seq-len", "1024", "--eval-tokens", "1024"], ["evaluation.seq_length"]),
        (["--num-tokens", "5"], ["too little text"]),
        (["--data", "missing.txt"], ["missing.txt"]),
        (["--tp", "3"], ["processes", "3"]),
        (["--vpp", "2"], ["virtual_pipeline_size", "pipeline"]),
        (["--teacher", "hf:nowhere"], ["nowhere"]),
        (["--student", "student"], ["student", "hf:DIR"]),
        (["--recompute", "some"], ["training.recompute", "selective"]),
        (["--micro-batch-size", "1000000", "--global-batch-size", "1000000"],
         ["does not fit into the memory", "activations", "recompute"]),
        (["--set", "distillation.criterion.temprature=2"], ["temperature"]),
        (["--set", "distillation.intermediate_layer_pairs=[[decoder.layers.9,decoder.layers.1]]"],
         ["decoder.layers.9", "decoder.layers.3"]),
        (["--recompute", "full", "--set", "distillation.intermediate_layer_pairs="
          "[[decoder.layers.1,decoder.layers.1]]"], ["training.recompute", "selective"]),
        (["--cache-teacher", "cache", "--set", "distillation.intermediate_layer_pairs="
          "[[decoder.layers.1,decoder.layers.1]]"], ["teacher_cache.path", "hidden states"]),
        (["--set", "teacher=null"], ["teacher", "nobody to learn from"]),
        (["--set", "guard.spike_factor=0.5"], ["guard.spike_factor", "above 1"]),
    ],
)  # fmt: skip
def test_a_job_that_cannot_run_is_refused(
    more: list[str], words: list[str], arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("run", *more)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_hybrids_are_refused(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_tiny_model(tmp_path / "hybrid", "nemotron_h")
    assert main(arguments("run", "--teacher", f"hf:{teacher}")) == 2
    assert "knows transformers alone" in capsys.readouterr().err


def test_a_teacher_with_another_vocabulary_is_refused(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_tiny_model(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = teacher / name
        file.write_text(file.read_text().replace("<|end|>", "<|fin|>"))
    assert main(arguments("run", "--teacher", f"hf:{teacher}")) == 2
    assert "differ in vocabulary" in capsys.readouterr().err


def test_output_that_is_there_and_unfinished_runs_are_not_touched(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    out.mkdir()
    (out / "precious").touch()
    assert main(arguments("run")) == 2
    assert "exists already" in capsys.readouterr().err
    (out / "precious").unlink()
    out.rmdir()
    work.mkdir()
    (work / "identity.json").write_text(json.dumps({"config": {"seed": 7}}))
    assert main(arguments("run")) == 2
    assert "unfinished run" in capsys.readouterr().err
    assert main(arguments("run", "--resume")) == 2
    assert "other settings" in capsys.readouterr().err


def test_exports_of_what_is_not_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "out"), "--to", f"hf:{tmp_path / 'x'}"]) == 2
    assert "no checkpoint of an unfinished run" in capsys.readouterr().err
