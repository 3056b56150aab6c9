"""Runs that keep the teacher's logits, and do without the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimtron_common.report import read_report
from slimtron_distill.__main__ import main
from slimtron_distill.training.log import read_log


def _without_teacher(arguments: list[str]) -> list[str]:
    place = arguments.index("--teacher")
    return arguments[:place] + arguments[place + 2 :]


def test_later_runs_need_no_teacher(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    # All of the vocabulary: the cached loss is then that of a teacher that runs along.
    flags = ("--cache-teacher", str(cache), "--cache-top-k", "300")

    def command(name: str, *more: str) -> list[str]:
        return arguments("run", *more, out=tmp_path / name)

    assert main(_without_teacher(command("early", *flags))) == 2
    assert "cache.json" in capsys.readouterr().err
    assert main(command("live")) == 0
    assert main(command("first", *flags)) == 0
    written = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    assert main(_without_teacher(command("second", *flags))) == 0
    assert written == {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}

    live, first, second = (tmp_path / name for name in ("live", "first", "second"))
    weights = [load_file(run / "model.safetensors") for run in (live, first, second)]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        assert torch.allclose(weights[1][name], value, atol=1e-4)
    losses = [[r["loss"] for r in read_log(run / "train.jsonl") if "loss" in r] for run in
              (live, first, second)]  # fmt: skip
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert read_report(first).columns == read_report(second).columns

    assert main(_without_teacher(command("third", *flags, "--seq-len", "8"))) == 2
    assert "something else" in capsys.readouterr().err
    (cache / "shard-00000.json").unlink()
    assert main(_without_teacher(command("third", *flags))) == 2
    assert "1 of 1 shards are missing" in capsys.readouterr().err
