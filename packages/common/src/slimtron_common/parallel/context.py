"""Start the processes' groups and know this process's place in them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from slimtron_common.backend.cpu import cpu_backend
from slimtron_common.errors import ConfigError, ParallelismError
from slimtron_common.parallel.config import ParallelConfig
from slimtron_common.parallel.lifeline import lifeline

__all__ = ["Device", "ParallelContext", "initialize_parallel", "resolve_device"]

Device = Literal["auto", "cpu", "cuda"]

K = TypeVar("K")
T = TypeVar("T")

_SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Set by ``srun`` alone."""


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This process's rank, the size and the group of every parallel axis.

    A context manager: leaving it takes down what ``initialize_parallel`` set up.
    """

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup
    ep_rank: int
    ep_size: int
    ep_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    """Data parallelism without context parallelism: the ranks that see different sequences."""
    dp_cp_group: dist.ProcessGroup
    """Data and context parallelism: the ranks that see different tokens."""
    expert_dp_rank: int
    """Which copy of the experts this is; those of one rank hold every expert once. It is 0 on the
    first data-parallel rank, and without expert parallelism there alone."""
    sequence_parallel: bool
    vpp_size: int = 1
    """Chunks of the model on every pipeline stage; more than one interleaves the pipeline."""
    _teardown: contextlib.ExitStack = field(repr=False, compare=False)

    @classmethod
    def from_megatron(
        cls,
        *,
        device: torch.device | None = None,
        sequence_parallel: bool = False,
        teardown: contextlib.ExitStack | None = None,
    ) -> ParallelContext:
        """Reads the groups that Megatron (or NeMo) has already initialised.

        Raises:
            ParallelismError: Megatron's model-parallel groups do not exist.
        """
        if not parallel_state.is_initialized():
            raise ParallelismError(
                "Megatron's model-parallel groups do not exist",
                hint="call slimtron_common.initialize_parallel(ParallelConfig(...)) first, or run "
                "inside your trainer after it has set up its strategy",
            )
        if device is None:
            device = torch.device("cpu")
            if torch.cuda.is_available():
                device = torch.device("cuda", torch.cuda.current_device())
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            cp_group=parallel_state.get_context_parallel_group(),
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            ep_group=parallel_state.get_expert_model_parallel_group(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            dp_group=parallel_state.get_data_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
            sequence_parallel=sequence_parallel,
            vpp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            _teardown=teardown or contextlib.ExitStack(),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that reports and renames."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this pipeline stage holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this pipeline stage computes the logits."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes its pipeline stage's weights to disk."""
        return self.tp_rank == 0 and self.dp_rank == 0 and self.cp_rank == 0

    def joined(self, part: Mapping[K, T]) -> dict[K, T]:
        """Joins what the processes of one copy of the model know, by names in the whole model.

        Every process of the copy calls it with what it knows of its stage and its experts.
        """
        found = dict(part)
        for size, group in ((self.ep_size, self.ep_group), (self.pp_size, self.pp_group)):
            parts: list[dict[K, T]] = [{}] * size
            dist.all_gather_object(parts, found, group=group)
            found = {name: item for part in parts for name, item in part.items()}
        return found

    def barrier(self) -> None:
        """Waits for every process."""
        dist.barrier()

    def shutdown(self) -> None:
        """Destroys the groups that ``initialize_parallel`` created; idempotent."""
        self._teardown.close()

    def __enter__(self) -> ParallelContext:
        return self

    def __exit__(self, *error: Any) -> None:
        self._teardown.__exit__(*error)


def initialize_parallel(
    config: ParallelConfig | None = None,
    *,
    device: Device = "auto",
    seed: int = 1234,
    timeout_minutes: float = 30.0,
    virtual_pipeline_size: int = 1,
) -> ParallelContext:
    """Sets up torch.distributed and Megatron's groups, from torchrun's environment or alone.

    Uses NCCL on GPUs and gloo on the CPU; on the CPU it also enters ``cpu_backend()``. A
    default process group that already exists is used and left alone at the end.

    Args:
        config: The parallel layout; one process without it.
        device: ``auto`` takes a GPU where there is one.
        seed: Seeds torch and Megatron's random-number tracker.
        timeout_minutes: How long a collective waits for a process that is late.
        virtual_pipeline_size: Chunks of the model on every pipeline stage.

    Raises:
        ConfigError: A GPU was asked for and torch sees none.
        ParallelismError: The layout does not fit the processes or the GPUs, or Megatron's
            model-parallel groups exist already.
    """
    config = config or ParallelConfig()
    if virtual_pipeline_size > 1 and config.pipeline_parallel_size == 1:
        raise ParallelismError(
            "only a pipeline of several stages can be interleaved",
            where="virtual_pipeline_size",
            found=virtual_pipeline_size,
            allowed="1 without pipeline parallelism",
        )
    if parallel_state.is_initialized():
        raise ParallelismError(
            "Megatron's model-parallel groups exist already",
            hint="leave the block of the earlier initialize_parallel first; inside a trainer that "
            "made the groups, use ParallelContext.from_megatron()",
        )
    device = resolve_device(device)
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(cpu_backend())
        if not dist.is_initialized():
            _init_process_group(stack, device, timeout_minutes)
        check_world_size(config, dist.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_parallel_size,
            pipeline_model_parallel_size=config.pipeline_parallel_size,
            virtual_pipeline_model_parallel_size=(
                virtual_pipeline_size if virtual_pipeline_size > 1 else None
            ),
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_parallel_size,
            distributed_timeout_minutes=round(timeout_minutes),
        )
        stack.callback(parallel_state.destroy_model_parallel)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        return ParallelContext.from_megatron(
            device=torch.device("cpu") if device == "cpu" else None,
            sequence_parallel=config.sequence_parallel,
            teardown=stack.pop_all(),
        )


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """The kind of device that a job runs on.

    Raises:
        ConfigError: A GPU was asked for and torch sees none.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError(
            "torch sees no GPU",
            where="device",
            found=device,
            hint="use the device cpu, or ask `slimtron-common doctor` what is wrong",
        )
    if device == "auto":
        return "cuda" if cuda else "cpu"
    return device


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Refuses a layout that the number of processes cannot hold.

    Raises:
        ParallelismError: With the command that starts the right number of processes.
    """
    needed = config.model_parallel_size
    if world_size % needed:
        raise ParallelismError(
            f"tensor {config.tensor_parallel_size} x pipeline {config.pipeline_parallel_size} x "
            f"context {config.context_parallel_size} parallelism needs {needed} processes for a "
            "copy of the model",
            where="parallel",
            found=f"{world_size} process{'es' if world_size > 1 else ''}",
            allowed=f"a multiple of {needed}",
            hint=f"start it with: torchrun --nproc-per-node {needed} -m slimtron_NAME ...",
        )
    rest = world_size // config.tensor_parallel_size // config.pipeline_parallel_size
    if rest % config.expert_parallel_size:
        raise ParallelismError(
            "expert parallelism must divide the processes left beside tensor and pipeline "
            "parallelism",
            where="parallel.expert_parallel_size",
            found=config.expert_parallel_size,
            allowed=f"a divisor of {rest}",
            hint=f"start it with: torchrun --nproc-per-node {config.min_world_size} -m "
            "slimtron_NAME ...",
        )


def world_size_from_environment() -> int:
    """The number of processes that the launcher started (1 without a launcher).

    A batch script is one process, although Slurm gives it the ``SLURM_NTASKS`` of its steps.
    """
    return int(os.environ.get("WORLD_SIZE") or os.environ.get(_SLURM_TASKS) or 1)


def local_rank_from_environment() -> int:
    """This process's number among those on its host (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def local_world_size_from_environment() -> int:
    """The largest number of processes that the launcher started on one host."""
    per_host = os.environ.get("LOCAL_WORLD_SIZE")
    # Slurm's are "8", or "4(x2),3": four on each of two hosts, three on another.
    per_host = per_host or os.environ.get("SLURM_STEP_TASKS_PER_NODE") or "1"
    return max(int(count.partition("(")[0]) for count in per_host.split(","))


def rank_from_environment() -> int:
    """This process's number among those that the launcher started (0 without a launcher)."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def _init_process_group(stack: contextlib.ExitStack, device: str, timeout_minutes: float) -> None:
    environment = os.environ
    if _SLURM_TASKS in environment:
        # srun starts one task a process; give torch the names it reads.
        for name, slurm in (
            ("RANK", "SLURM_PROCID"),
            ("LOCAL_RANK", "SLURM_LOCALID"),
            ("WORLD_SIZE", _SLURM_TASKS),
        ):
            if name not in environment and slurm in environment:
                environment[name] = environment[slurm]
    world_size = int(environment.get("WORLD_SIZE", "1"))
    backend, timeout = "gloo", datetime.timedelta(minutes=timeout_minutes)
    device_id = None
    if device == "cuda":
        backend = "nccl"
        local_rank = local_rank_from_environment()
        if local_rank >= torch.cuda.device_count():
            raise ParallelismError(
                "there are more processes on this host than GPUs",
                where="LOCAL_RANK",
                found=local_rank,
                allowed=f"below {torch.cuda.device_count()}",
                hint="lower torchrun's --nproc-per-node",
            )
        torch.cuda.set_device(local_rank)
        # NCCL would guess it from the rank, wrongly on hosts that are not all alike.
        device_id = torch.device("cuda", local_rank)
    if world_size == 1:
        # torch exports HashStore without listing it.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id
        )
        stack.callback(dist.destroy_process_group)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ParallelismError(
            f"{world_size} processes are announced, but the launcher's {', '.join(missing)} "
            "is missing from the environment",
            where="WORLD_SIZE",
            found=world_size,
            hint="start the job with torchrun, or export MASTER_ADDR and MASTER_PORT under Slurm",
        )
    # torch exports it without listing it.
    rendezvous = dist.rendezvous("env://", timeout=timeout)  # type: ignore[attr-defined]
    store, rank, world_size = next(rendezvous)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device_id,
    )
    stack.callback(dist.destroy_process_group)
    stack.enter_context(lifeline(store, rank, world_size))
