"""The state of a training on disk, to go on from: whole or not there, whenever the process dies.

Each checkpoint is a directory ``step-00000100``: a distributed checkpoint of Megatron-Core with
the student and the optimizer, which opens in any layout, and ``state.json`` with the rest.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from slimtron_common.atomic import remove_directory
from slimtron_common.checkpoint.base import read_json
from slimtron_common.checkpoint.metadata import check_metadata, refuse_code
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.errors import CheckpointError
from slimtron_common.parallel import ParallelContext
from slimtron_distill.training.config import CheckpointConfig
from slimtron_distill.training.trainer import Trainer

__all__ = ["TrainingCheckpoints", "find_checkpoints", "load_student"]

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
_SHARDING = {
    # Each weight's state as one tensor of the weight's shape, whatever the layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def find_checkpoints(directory: Path) -> dict[int, Path]:
    """The finished checkpoints in a directory by their step, in order."""
    found = {int(path.name.removeprefix("step-")): path for path in directory.glob("step-*")}
    return dict(sorted(found.items()))


class TrainingCheckpoints:
    """Saves and loads the state of one training. All processes call every method.

    Args:
        directory: Where the checkpoints lie, on storage that all processes share.
        context: This process's place.
        config: How many are kept, and whether training goes on while one is written.
    """

    def __init__(self, directory: Path, context: ParallelContext, config: CheckpointConfig) -> None:
        self._directory, self._context, self._config = directory, context, config
        self._queue = AsyncCallsQueue()
        if context.is_main:
            directory.mkdir(exist_ok=True)
        context.barrier()

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint, or begins to; an earlier one that is being written is awaited."""
        self.finish()
        path = self._directory / f"step-{trainer.step:08d}"
        if path.exists():
            return
        stack = contextlib.ExitStack()
        temporary = stack.enter_context(collective_directory(path, self._context))
        state = json.dumps(_json_state(trainer), indent=2)
        request = _begin_save(_sharded_state(trainer, is_loading=False), temporary)

        def complete() -> None:
            if self._context.is_main:
                (temporary / STATE_NAME).write_text(state, encoding="utf-8")
            # Gives the directory its name.
            stack.close()
            self._remove_old()
            logger.info("checkpoint %s", path)

        request.finalize_fns.append(complete)
        if self._config.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self) -> None:
        """Completes a checkpoint whose files are written; to be called now and then."""
        self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Waits for a checkpoint that is being written."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def load_latest(self, trainer: Trainer) -> bool:
        """Takes up the newest checkpoint, in whatever layout it was written.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: It is damaged, or is not one of this training.
        """
        found = find_checkpoints(self._directory)
        if not found:
            return False
        path = list(found.values())[-1]
        check_metadata(path)
        state = read_json(path / STATE_NAME)
        loaded = _load(_sharded_state(trainer, is_loading=True), path)
        for index, chunk in enumerate(trainer.task.student_chunks):
            chunk.load_state_dict(loaded[f"student{index}"], strict=False)
        for name, parameter in trainer.task.extra_parameters().items():
            parameter.data.copy_(loaded["extra"][name])
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        trainer.step = state["step"]
        trainer.guard.load_state_dict(state["guard"])
        trainer.task.load_state_dict(state["task"])
        if state["layout"] != _layout(self._context):
            logger.info("written as %s, taken up as %s", state["layout"], _layout(self._context))
        return True

    def _remove_old(self) -> None:
        if self._context.is_main:
            for old in list(find_checkpoints(self._directory).values())[: -self._config.keep]:
                remove_directory(old)


def load_student(chunks: Sequence[Any], path: Path) -> None:
    """Fills a student, in whatever layout it was built, from a training checkpoint.

    Args:
        chunks: Its ``GPTModel``, or virtual pipeline chunks.
        path: The checkpoint.

    Raises:
        CheckpointError: It is damaged, or is not one of this student.
    """
    check_metadata(path)
    loaded = _load(_student_state(chunks), path)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"student{index}"], strict=False)


def _student_state(chunks: Sequence[Any]) -> dict[str, Any]:
    # Transformer Engine's extra state holds FP8 recipes, which are set anew.
    return {
        f"student{index}": {
            key: value
            for key, value in chunk.sharded_state_dict(prefix="").items()
            if "_extra_state" not in key
        }
        for index, chunk in enumerate(chunks)
    }


def _sharded_state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    state = _student_state(trainer.task.student_chunks)
    rank, replica = trainer.context.tp_rank, dist.get_rank(trainer.context.dp_cp_group)
    state["extra"] = {
        name: ShardedTensor.from_rank_offsets(
            f"extra.{name}", parameter, replica_id=(0, rank, replica)
        )
        for name, parameter in trainer.task.extra_parameters().items()
    }
    weights = {
        f"{part}.{key}": value for part, named in state.items() for key, value in named.items()
    }
    state["optimizer"] = trainer.optimizer.sharded_state_dict(
        weights, is_loading=is_loading, metadata=_SHARDING
    )
    return state


def _json_state(trainer: Trainer) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "guard": trainer.guard.state_dict(),
        "task": trainer.task.state_dict(),
        "layout": _layout(trainer.context),
    }


def _layout(context: ParallelContext) -> str:
    return (
        f"tensor {context.tp_size} x pipeline {context.pp_size} x virtual {context.vpp_size} x "
        f"expert {context.ep_size} x data {context.dp_size}"
    )


def _begin_save(state: dict[str, Any], directory: Path) -> Any:
    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        # The other one needs a package of its own.
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(state, str(directory), async_sharded_save=True, **options)


def _load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        with refuse_code(), warnings.catch_warnings():
            # Megatron-Core reads by functions that torch is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))
            return loaded
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(
            "the checkpoint is damaged or not one of this training",
            where=directory,
            found=str(error).strip().rpartition("\n")[2],
            hint="remove it, and --resume takes the one before it",
        ) from error
