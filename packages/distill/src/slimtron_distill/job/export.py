"""Write the student of a training checkpoint as a model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from slimtron_common.atomic import check_writable
from slimtron_common.checkpoint import open_checkpoint, parse_spec
from slimtron_common.checkpoint.base import read_json
from slimtron_common.checkpoint.kinds import WRITERS
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.errors import CheckpointError
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.parallel.context import Device
from slimtron_common.workdir import IDENTITY_NAME, work_path
from slimtron_distill.job.run import CHECKPOINTS
from slimtron_distill.training.checkpoint import find_checkpoints, load_student

__all__ = ["export_checkpoint"]

logger = logging.getLogger(__name__)


def export_checkpoint(
    run: Path,
    target: str,
    *,
    step: int | None = None,
    dtype: str = "auto",
    parallel: ParallelConfig | None = None,
    device: Device = "auto",
    overwrite: bool = False,
) -> int:
    """Writes the student as it is in a checkpoint of an unfinished run, which may go on meanwhile.

    All processes call it.

    Args:
        run: The run's output directory, which is not there yet.
        target: ``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``.
        step: Which checkpoint; the newest without it.
        dtype: torch's name of the type to write, or ``auto``: as the student came.
        parallel: How the model is cut meanwhile; not necessarily as in training.
        device: Where it is held meanwhile.
        overwrite: Whether an existing directory is replaced.

    Returns:
        The checkpoint's step.

    Raises:
        CheckpointError: There is no such checkpoint, or the target cannot be written.
    """
    kind, path = parse_spec(target, where="--to")
    work = work_path(run)
    found = find_checkpoints(work / CHECKPOINTS)
    if not found:
        raise CheckpointError(
            "no checkpoint of an unfinished run is there",
            where=work,
            hint=f"a finished run's student is {run} itself; `slimtron-common convert` writes it "
            "as another kind"
            if run.exists()
            else "give the directory that the run was told to write",
        )
    chosen = list(found)[-1] if step is None else step
    if chosen not in found:
        raise CheckpointError(
            "that step has no checkpoint", where=work, found=chosen, allowed=list(found)
        )
    config = read_json(work / IDENTITY_NAME)["config"]
    student = open_checkpoint(
        config["student"], where="student", trust_remote_code=config["trust_remote_code"]
    )
    written: torch.dtype = student.dtype if dtype == "auto" else getattr(torch, dtype)
    check_writable(
        path, overwrite=overwrite, required_bytes=student.num_parameters * written.itemsize
    )
    with initialize_parallel(parallel, device=device) as context:
        model = build_chunks(student.architecture, context, dtype=written)
        load_student(model, found[chosen])
        with collective_directory(path, context, overwrite=overwrite) as directory:
            WRITERS[kind](
                directory,
                nn.ModuleList(model),
                student.architecture,
                context,
                companions=student.companion_files(),
            )
    logger.info("wrote the student of step %d to %s", chosen, target)
    return chosen
