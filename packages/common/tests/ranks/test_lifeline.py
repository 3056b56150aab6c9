"""Processes that are killed, and what the others do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from slimtron_common.parallel import initialize_parallel, lifeline

RANKS = 3


def _work(rank: int, victim: int, way: str) -> None:
    """One process of a job; the others are stuck, as in a collective, when the victim goes."""
    lifeline.GRACE = 1.0
    if way == "end":
        return
    if rank != victim:
        time.sleep(600)
    time.sleep(0.5)
    if way == "raise":
        raise ValueError("the victim's own error")
    # A writer of checkpoints may outlive the process that started it.
    if way == "fork" and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def _watched(rank: int, port: int, folder: str, victim: int, way: str) -> None:
    import torch.distributed as dist

    sys.stderr = open(f"{folder}/{rank}.txt", "w", buffering=1)  # noqa: SIM115
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0)
    with lifeline.lifeline(store, rank, RANKS):
        store.add("ready", 1)
        while store.add("ready", 0) < RANKS:
            time.sleep(0.01)
        _work(rank, victim, way)


def _in_job(rank: int, port: int, folder: str, victim: int, way: str) -> None:
    sys.stderr = open(f"{folder}/{rank}.txt", "w", buffering=1)  # noqa: SIM115
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with initialize_parallel(device="cpu") as context:
        context.barrier()
        _work(rank, victim, way)


def _start(job: Callable[..., None], folder: Path, victim: int, way: str) -> list[int | None]:
    """Exit codes of the processes."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["slimtron_common.parallel", "torch.distributed"])
    processes = [
        context.Process(target=job, args=(rank, port, str(folder), victim, way))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 60
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("job", "victim", "way"),
    [
        (_watched, 0, "kill"),
        (_watched, 1, "fork"),
        (_watched, 2, "raise"),
        (_watched, 0, "raise"),
        (_in_job, 1, "kill"),
    ],
)
def test_the_others_stop_and_name_the_one_that_is_gone(
    job: Callable[..., None], victim: int, way: str, tmp_path: Path
) -> None:
    codes = _start(job, tmp_path, victim, way)
    assert codes[victim] == (1 if way == "raise" else -signal.SIGKILL)
    for rank in {*range(RANKS)} - {victim}:
        assert codes[rank] == 1, codes
        message = (tmp_path / f"{rank}.txt").read_text()
        assert f"rank {victim} has ended before the others, so rank {rank} stops" in message
        assert "--resume" in message


def test_a_job_that_ends_says_nothing(tmp_path: Path) -> None:
    assert _start(_in_job, tmp_path, 0, "end") == [0] * RANKS
    assert not any("rank" in (tmp_path / f"{rank}.txt").read_text() for rank in range(RANKS))
