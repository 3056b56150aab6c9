"""Runs that are killed, and go on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from slimtron_quant.__main__ import main

Arguments = Callable[..., list[str]]

KILLS = 10


def _contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _run(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    sys.exit(main([*arguments, "-q", "-q"]))


@pytest.fixture(scope="module")
def start() -> Callable[[list[str]], BaseProcess]:
    """Starts the command in a process of its own that need not import the libraries again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slimtron_quant.job.run", "modelopt.torch.quantization"])

    def starter(arguments: list[str]) -> BaseProcess:
        process = context.Process(target=_run, args=(arguments,))
        process.start()
        return process

    return starter


def test_killed_at_random_moments_the_output_has_the_same_bytes(
    start: Callable[[list[str]], BaseProcess], arguments: Arguments, tmp_path: Path
) -> None:
    """SIGKILL at ten random moments in the life of a job whose recipe changes weights."""
    out, command = tmp_path / "out", arguments("run", "--recipe", "int8_sq")
    # The first run pays for the imports.
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.monotonic()
        process = start(command)
        process.join()
        duration = time.monotonic() - begin
        assert process.exitcode == 0
    undisturbed = _contents(out)
    shutil.rmtree(out)

    generator = random.Random(0)
    stages = set()
    for kill in range(KILLS):
        process = start([*command, "--resume"])
        # Later kills come later, so that every stage is met although earlier ones are kept.
        process.join(duration * generator.uniform(0.05, 0.2 + 0.8 * kill / KILLS))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if out.exists():
            # Whatever happened, what is there is whole.
            assert _contents(out) == undisturbed
            shutil.rmtree(out)
        work = tmp_path / "out.work"
        stages.add(tuple(sorted(p.name for p in work.iterdir())) if work.exists() else ())
    process = start([*command, "--resume"])
    process.join()
    assert process.exitcode == 0
    assert _contents(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["out"]
    # The kills struck at different points of the walk.
    assert len(stages) > 1


def test_resume_after_the_end_says_what_was_done(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments("run", "--recipe", "int4", "--block-size", "auto")
    assert main(command) == 0
    before = _contents(tmp_path / "out")
    assert main([*command, "--resume"]) == 0
    assert "Perplexity" in capsys.readouterr().out
    assert _contents(tmp_path / "out") == before


def _unfinished(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A job that stopped after its calibration."""
    from slimtron_quant.job import run

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = arguments("run")
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_export", fail)
        assert main(command) == 130
    assert (tmp_path / "out.work" / "calibration").is_dir()
    assert not (tmp_path / "out").exists()
    return command


def test_an_unfinished_run_is_neither_lost_nor_overwritten(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = _unfinished(arguments, tmp_path, monkeypatch)
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "9"]) == 2
    assert "config.seed was 1234 and is now 9" in capsys.readouterr().err
    assert (tmp_path / "out.work" / "calibration").is_dir()


def test_resume_does_not_calibrate_again(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtron_quant.quantizer import Quantizer

    command = _unfinished(arguments, tmp_path, monkeypatch)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(Quantizer, "quantize", never)
    assert main([*command, "--resume"]) == 0


def test_overwrite_replaces_output_and_unfinished_run(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = _unfinished(arguments, tmp_path, monkeypatch)
    assert main([*command, "--overwrite"]) == 0
    (tmp_path / "out" / "mine.txt").write_text("old")
    assert main([*command, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_damaged_stage_is_refused(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = _unfinished(arguments, tmp_path, monkeypatch)
    file = next((tmp_path / "out.work" / "calibration").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    assert main([*command, "--resume"]) == 2
    assert file.name in capsys.readouterr().err


def test_the_manifest_repeats_the_job(arguments: Arguments, tmp_path: Path) -> None:
    assert main(arguments("run", "--recipe", "int4", "--block-size", "16")) == 0
    manifest = json.loads((tmp_path / "out" / "slimtron.json").read_text())
    assert manifest["config"]["config"]["quantization"]["awq_block_size"] == 16
    assert manifest["seed"] == 1234
