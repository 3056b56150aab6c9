from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from slimtron_common.config import build_config
from slimtron_distill.__main__ import main
from slimtron_distill.job.config import DistillJobConfig
from slimtron_distill.job.preflight import preflight


def _count(directory: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())


def test_a_plan_shows_memory_by_part_and_runs_nothing(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("plan", "--processes", "2")) == 0
    shown = capsys.readouterr().out
    for part in ("student", "gradients", "optimizer", "teacher", "logits", "activations"):
        assert f"memory: {part}" in shown
    assert "8 steps of 4 sequences of 16 tokens: 512 tokens" in shown
    assert not any(tmp_path.iterdir())


def test_memory_is_what_the_models_and_the_layout_take(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def memory(world_size: int = 1, **changes: Any) -> dict[str, float]:
        flags = {
            "student": f"hf:{tiny_student}",
            "teacher": f"hf:{tiny_teacher}",
            "output": str(tmp_path / "out"),
            "training.steps": 4,
            "training.seq_length": 64,
            "device": "cpu",
            "evaluation.num_tokens": 1024,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        config = build_config(DistillJobConfig, flags=flags)
        return dict(preflight(config, world_size=world_size).memory)

    whole, student = memory(), _count(tiny_student)
    assert whole["student"] == whole["gradients"] == student * 4
    assert whole["optimizer"] == student * 8
    assert whole["teacher"] == _count(tiny_teacher) * 4
    assert memory(world_size=2)["optimizer"] == whole["optimizer"] / 2
    # A copy of the weights in fp32 comes with the moments.
    half = memory(dtype="bfloat16")
    assert half["student"] == student * 2
    assert half["optimizer"] == student * 12
    assert half["gradients"] == whole["gradients"]
    assert memory(training__recompute="full")["activations"] < whole["activations"] / 2
    assert memory(training__micro_batch_size=2)["logits"] == 2 * whole["logits"]
    # Less room makes more parts, but the text's own loss needs the logits whole.
    assert memory(training__logit_memory=1e-5)["logits"] == int(1e-5 * 2**30) < whole["logits"]
    kept = memory(training__logit_memory=1e-5, distillation__skip_lm_loss=False)
    assert kept["logits"] > whole["logits"]
    split = memory(world_size=2, parallel__tensor_parallel_size=2)
    assert split["teacher"] == whole["teacher"] / 2
