from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slimtron_common.backend import cpu_backend_active
from slimtron_common.errors import ConfigError, ParallelismError
from slimtron_common.parallel import ParallelConfig, ParallelContext, initialize_parallel
from slimtron_common.parallel.context import (
    check_world_size,
    local_rank_from_environment,
    local_world_size_from_environment,
    rank_from_environment,
    resolve_device,
    world_size_from_environment,
)

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
)
BATCH_SCRIPT = {
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES + SLURM:
        # Setting first makes monkeypatch undo what the code itself sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("layout", "world_size", "needed"),
    [
        ({"tensor_parallel_size": 2}, 1, 2),
        ({"tensor_parallel_size": 2}, 3, 2),
        ({"pipeline_parallel_size": 4}, 2, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 6, 4),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2}, 2, 4),
    ],
)
def test_layout_must_fit_the_processes(
    layout: dict[str, int], world_size: int, needed: int
) -> None:
    config = ParallelConfig(**layout)
    with pytest.raises(ParallelismError) as caught:
        check_world_size(config, world_size)
    assert caught.value.allowed == f"a multiple of {needed}"
    assert f"--nproc-per-node {needed}" in str(caught.value.hint)
    assert str(caught.value.found).startswith(f"{world_size} process")
    for multiple in (1, 2, 3):
        check_world_size(config, needed * multiple)


def test_experts_share_out_what_is_left() -> None:
    config = ParallelConfig(tensor_parallel_size=2, expert_parallel_size=4)
    check_world_size(config, 8)
    with pytest.raises(ParallelismError, match="expert") as caught:
        check_world_size(config, 12)
    assert caught.value.where == "parallel.expert_parallel_size"


def test_one_process_is_a_whole_world() -> None:
    with initialize_parallel(device="cpu") as context:
        assert cpu_backend_active()
        assert dist.get_backend() == "gloo"
        assert context.device == torch.device("cpu")
        for axis in ("tp", "pp", "cp", "ep", "dp"):
            assert getattr(context, f"{axis}_rank") == 0
            assert getattr(context, f"{axis}_size") == 1
            assert getattr(context, f"{axis}_group").size() == 1
        assert context.is_main
        assert context.is_writer
        assert context.is_first_stage
        assert context.is_last_stage
        assert not context.sequence_parallel
        context.barrier()
        # Whoever comes second reads the groups that are there.
        again = ParallelContext.from_megatron()
        assert again == ParallelContext.from_megatron(device=context.device)
        again.shutdown()
        assert dist.is_initialized()
    assert not dist.is_initialized()
    assert not cpu_backend_active()
    context.shutdown()


def test_a_second_world_may_follow() -> None:
    for seed in (1, 2, 1):
        with initialize_parallel(device="cpu", seed=seed):
            drawn = torch.rand(1).item()
        torch.manual_seed(seed)
        assert drawn == torch.rand(1).item()


def test_refused_layout_leaves_nothing_behind() -> None:
    with pytest.raises(ParallelismError, match="needs 2 processes"):
        initialize_parallel(ParallelConfig(tensor_parallel_size=2), device="cpu")
    assert not dist.is_initialized()
    assert not cpu_backend_active()
    with initialize_parallel(device="cpu"):
        pass


def test_one_stage_cannot_be_interleaved() -> None:
    with pytest.raises(ParallelismError, match="virtual_pipeline_size"):
        initialize_parallel(virtual_pipeline_size=2)
    assert not dist.is_initialized()


def test_a_process_group_that_exists_is_used_and_kept() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with initialize_parallel(device="cpu") as context:
            assert context.world_size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_groups_of_someone_else_are_told() -> None:
    with initialize_parallel(device="cpu") as context:
        with pytest.raises(ParallelismError, match="exist already") as caught:
            initialize_parallel(device="cpu")
        assert "from_megatron" in str(caught.value.hint)
        assert cpu_backend_active()
        context.barrier()


def test_groups_that_do_not_exist_cannot_be_read() -> None:
    with pytest.raises(ParallelismError, match="do not exist") as caught:
        ParallelContext.from_megatron()
    assert "initialize_parallel" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("environment", "world_size", "rank"),
    [
        ({}, 1, 0),
        ({"WORLD_SIZE": "4", "RANK": "3"}, 4, 3),
        ({**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, 8, 5),
        # A step smaller than the job, with srun's --preserve-env.
        ({**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 2, 1),
        (BATCH_SCRIPT, 1, 0),
        # torchrun inside a Slurm job.
        ({"WORLD_SIZE": "4", "RANK": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 4, 3),
    ],
)
def test_launchers_are_read(
    environment: dict[str, str], world_size: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_size_from_environment() == world_size
    assert rank_from_environment() == rank


@pytest.mark.parametrize(
    ("environment", "local_world_size", "local_rank"),
    [
        ({}, 1, 0),
        (BATCH_SCRIPT, 1, 0),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 4, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "7"}, 8, 7),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),5,1(x2)"}, 5, 0),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 4, 0),
    ],
)
def test_processes_of_a_host_are_counted(
    environment: dict[str, str],
    local_world_size: int,
    local_rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_world_size_from_environment() == local_world_size
    assert local_rank_from_environment() == local_rank


def test_a_batch_script_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BATCH_SCRIPT.items():
        monkeypatch.setenv(name, value)
    with initialize_parallel(device="cpu") as context:
        assert (context.rank, context.world_size) == (0, 1)


def test_a_launcher_without_a_meeting_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(ParallelismError, match="MASTER_ADDR, MASTER_PORT") as caught:
        initialize_parallel(ParallelConfig(tensor_parallel_size=2), device="cpu")
    assert "Slurm" in str(caught.value.hint)
    assert not dist.is_initialized()
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.delenv("RANK")
    with pytest.raises(ParallelismError, match="RANK, MASTER_ADDR"):
        initialize_parallel(device="cpu")


def test_slurm_tasks_form_one_world(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        from slimtron_common.parallel import ParallelConfig, initialize_parallel

        if __name__ == "__main__":
            with initialize_parallel(ParallelConfig(pipeline_parallel_size=2)) as c:
                print(c.rank, c.world_size, c.pp_rank, c.is_main, c.is_writer, c.is_last_stage)
        """
    )
    (tmp_path / "script.py").write_text(script)
    with contextlib.closing(_free_port()) as listener:
        port = str(listener.getsockname()[1])
    tasks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "script.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **_environment(),
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]
    lines = [task.communicate(timeout=240)[0].strip() for task in tasks]
    assert lines == ["0 2 0 True True False", "1 2 1 False True True"]


def _free_port() -> object:
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name not in NAMES + SLURM}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="no GPU") as caught:
        resolve_device("cuda")
    assert "doctor" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no GPU"):
        initialize_parallel(device="cuda")
    assert not dist.is_initialized()
