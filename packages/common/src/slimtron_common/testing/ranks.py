"""Run one function in several processes that form a gloo process group."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["PRELOADED", "RankError", "run_ranks"]

PRELOADED = [
    "megatron.core.models.gpt",
    "safetensors.torch",
    "slimtron_common.models.megatron",
    "transformers",
]
"""Modules that the processes start with; only additions before the first ``run_ranks`` count."""


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
) -> list[Any]:
    """Runs ``fn(rank, world_size, *args)`` in ``world_size`` processes of their own.

    The processes meet through a file in a temporary folder, never through a port, so tests
    that run side by side cannot collide. The default process group (gloo) exists when ``fn``
    starts and is destroyed when it returns.

    Args:
        fn: A module-level function (it is pickled).
        world_size: Number of processes.
        *args: Picklable arguments passed on to every rank.
        timeout: Seconds until the remaining processes are ended and ``RankError`` is raised.

    Returns:
        What each rank returned, by rank. Tensors must be on the CPU.

    Raises:
        RankError: A rank raised (its traceback is in the message), died or hung.
    """
    # Forks of one process that has imported the libraries once: they start in no time.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory(prefix="slimtron-ranks-") as folder:
        processes: list[BaseProcess] = [
            context.Process(
                target=_rank_main, args=(fn, rank, world_size, folder, timeout, args), daemon=False
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(_result(folder, r), weights_only=False) for r in range(world_size)]


def _wait(processes: list[BaseProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        # The first rank that fails is the cause; the others only lose their peer afterwards.
        failures = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            raise RankError("\n".join(path.read_text() for path in failures))
        for rank, process in enumerate(processes):
            if process.exitcode not in (None, 0):
                raise RankError(f"rank {rank} died with exit code {process.exitcode}")
        if all(process.exitcode == 0 for process in processes):
            return
        if time.monotonic() > deadline:
            waiting = [rank for rank, p in enumerate(processes) if p.exitcode is None]
            raise RankError(f"ranks {waiting} did not end within {timeout:.0f} s")
        time.sleep(0.02)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = fn(rank, world_size, *args)
        # Nobody leaves while a peer may still need it for a collective.
        dist.barrier()
        temporary = Path(folder) / f"result-{rank}.tmp"
        with temporary.open("wb") as file:
            torch.save(result, file, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        temporary.rename(_result(folder, rank))
    except BaseException:
        temporary = Path(folder) / f"error-{rank}.tmp"
        temporary.write_text(f"--- rank {rank} of {world_size} ---\n{traceback.format_exc()}")
        temporary.rename(temporary.with_suffix(".txt"))
        # A peer may be inside a collective that this rank will never join: do not wait for it.
        os._exit(0)
    if dist.is_initialized():
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
