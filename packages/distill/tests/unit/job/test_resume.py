"""Runs that are killed, and go on."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from slimtron_distill.__main__ import main
from slimtron_distill.training.log import read_log

Arguments = Callable[..., list[str]]

STEPS = 8
KILLS = 5


def _run(arguments: list[str]) -> None:
    import torch

    # Megatron-Core's writers are processes, too, and die with this one.
    os.setsid()
    torch.set_num_threads(1)
    sys.exit(main([*arguments, "-q", "-q"]))


@pytest.fixture(scope="module")
def start() -> Callable[[list[str]], BaseProcess]:
    """Starts the command in a process of its own that need not import the libraries again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slimtron_distill.job.run", "transformers"])

    def starter(arguments: list[str]) -> BaseProcess:
        process = context.Process(target=_run, args=(arguments,))
        process.start()
        return process

    return starter


def _weights(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _kill(process: BaseProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has ended, or has no group of its own yet.
        process.kill()
    process.join()


def _losses(directory: Path) -> list[object]:
    return [record.get("loss") for record in read_log(directory / "train.jsonl")]


def test_killed_at_random_moments_the_student_has_the_same_bytes(
    start: Callable[[list[str]], BaseProcess], arguments: Arguments, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    # A balancer whose factors go on from step to step.
    command = arguments(
        "run",
        *("--set", "distillation.skip_lm_loss=false"),
        *("--set", "distillation.loss_balancer=dynamic"),
    )
    process = start(command)
    process.join()
    assert process.exitcode == 0
    undisturbed, losses = _weights(out), _losses(out)
    shutil.rmtree(out)

    generator = random.Random(0)
    resumable = set()
    for step in sorted(generator.sample(range(1, STEPS + 1), KILLS)):
        process = start([*command, "--resume"])
        while process.is_alive():
            records = read_log(work / "train.jsonl")
            if records and records[-1]["step"] >= step:
                break
            time.sleep(0.01)
        # Checkpoints are written, and the student measured, while and after steps go on.
        time.sleep(generator.uniform(0, 1))
        _kill(process)
        resumable |= {path.name for path in work.glob("checkpoints/step-*")}
        if out.exists():
            # Whatever happened, what is there is whole.
            assert _weights(out) == undisturbed
    process = start([*command, "--resume"])
    process.join()
    assert process.exitcode == 0
    assert _weights(out) == undisturbed
    assert _losses(out) == losses
    # When step 6 is done, the checkpoint of step 2 is complete.
    assert resumable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
