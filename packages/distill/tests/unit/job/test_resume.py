"""Runs that are killed, and go on."""

from __future__ import annotations

import hashlib
import json
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

Arguments = Callable[..., list[str]]

KILLS = 6


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


def test_killed_at_random_moments_the_student_has_the_same_bytes(
    start: Callable[[list[str]], BaseProcess], arguments: Arguments, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # A balancer whose factors go on from step to step.
    command = arguments(
        "run",
        *("--set", "distillation.skip_lm_loss=false"),
        *("--set", "distillation.loss_balancer=dynamic"),
    )
    # The first run pays for the imports.
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.monotonic()
        process = start(command)
        process.join()
        duration = time.monotonic() - begin
        assert process.exitcode == 0
    undisturbed = _weights(out)
    losses = [json.loads(line).get("loss") for line in (out / "train.jsonl").open()]
    shutil.rmtree(out)

    generator = random.Random(0)
    steps = set()
    for kill in range(KILLS):
        process = start([*command, "--resume"])
        # Later kills come later, so that every stage is met although earlier ones are kept.
        process.join(duration * generator.uniform(0.1, 0.4 + 0.6 * kill / KILLS))
        _kill(process)
        assert process.exitcode in (0, -signal.SIGKILL)
        steps |= {path.name for path in tmp_path.glob("out.work/checkpoints/step-*")}
        if out.exists():
            # Whatever happened, what is there is whole.
            assert _weights(out) == undisturbed
    process = start([*command, "--resume"])
    process.join()
    assert process.exitcode == 0
    assert _weights(out) == undisturbed
    assert [json.loads(line).get("loss") for line in (out / "train.jsonl").open()] == losses
    assert steps, "no kill met the training"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
