from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slimtron_common.testing import RankError, run_ranks


def _sum_of_ranks(rank: int, world_size: int, offset: float) -> dict[str, object]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return {
        "total": total,
        "rank": (rank, dist.get_rank(), os.environ["RANK"], os.environ["LOCAL_RANK"]),
        "size": (world_size, dist.get_world_size(), os.environ["WORLD_SIZE"]),
        "folder": Path("a"),
    }


def _raise_in_the_second(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the number is 42")
    # Waits for a peer that never comes.
    dist.barrier()


def _exit_without_a_word(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.barrier()


def _leave_early(rank: int, world_size: int) -> None:
    if rank == 1:
        raise SystemExit(0)


def _sleep(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)


def test_ranks_form_a_group_and_return_in_order() -> None:
    results = run_ranks(_sum_of_ranks, 2, 10.0)
    for rank, result in enumerate(results):
        assert result["total"].item() == 21.0
        assert result["rank"] == (rank, rank, str(rank), str(rank))
        assert result["size"] == (2, 2, "2")
        assert result["folder"] == Path("a")
    assert not dist.is_initialized()


def test_what_a_rank_raises_is_told_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_raise_in_the_second, 2, timeout=300)
    message = str(caught.value)
    assert "--- rank 1 of 2 ---" in message
    assert "ValueError: the number is 42" in message
    assert "in _raise_in_the_second" in message
    # The peer in the barrier is not waited for.
    assert time.monotonic() - start < 150


def test_leaving_early_is_an_error_too() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*SystemExit"):
        run_ranks(_leave_early, 2)


def test_a_rank_that_dies_is_told() -> None:
    with pytest.raises(RankError, match=r"rank 0 died with exit code 7|rank 1 of 2"):
        run_ranks(_exit_without_a_word, 2)


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"ranks \[.*1\] did not end within"):
        run_ranks(_sleep, 2, tmp_path, timeout=10)
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
