"""What a job has finished so far, kept beside its output so that ``--resume`` can go on.

A job is a sequence of stages, each of which leaves one directory that appears whole or not at
all. A run that was killed starts again at the first stage that is missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimtron_common.atomic import atomic_directory, remove_directory
from slimtron_common.checkpoint.base import read_json
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.parallel.context import ParallelContext

__all__ = ["WorkDir", "check_resumable", "work_path"]

logger = logging.getLogger(__name__)

IDENTITY_NAME = "identity.json"
RESULT_NAME = "result.json"


def work_path(output: Path) -> Path:
    """Where the stages of the job that writes ``output`` are kept."""
    return output.with_name(f"{output.name}.work")


def check_resumable(
    output: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Decides whether a job may start, before anything is loaded.

    Args:
        output: The job's output directory.
        identity: What makes the job this job: its config and its inputs, as JSON values.
        resume: Whether finished stages are to be used.
        overwrite: Whether an earlier run's stages may be thrown away.

    Raises:
        CheckpointError: An unfinished run is there and neither flag was given, or something is
            there that no run left.
        ConfigError: The unfinished run had another config or input.
    """
    path = work_path(output)
    if not _holds_run(path) or (overwrite and not resume):
        return
    if not resume:
        raise CheckpointError(
            "an unfinished run of this output is there",
            where=path,
            hint="--resume goes on with it, --overwrite starts again",
        )
    before = read_json(path / IDENTITY_NAME)
    changed = sorted(_differences(before, json.loads(json.dumps(identity)), ""))
    if changed:
        raise ConfigError(
            "the unfinished run was started with other settings or inputs",
            where=path,
            found="; ".join(changed),
            hint="repeat the command as it was, or start again with --overwrite",
        )


class WorkDir:
    """The stages of one job.

    Args:
        output: The job's output directory; the stages lie in a sibling.
        identity: As for ``check_resumable``, which was called before.
        context: This process's place; every process opens the directory.
        resume: Whether finished stages are used; otherwise they are removed.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, Any],
        context: ParallelContext,
        *,
        resume: bool,
    ) -> None:
        self.path = work_path(output)
        self._context = context
        if context.is_main:
            if _holds_run(self.path) and not resume:
                remove_directory(self.path)
            if not _holds_run(self.path):
                with atomic_directory(self.path) as directory:
                    text = json.dumps(identity, indent=2)
                    (directory / IDENTITY_NAME).write_text(text, encoding="utf-8")
        context.barrier()

    def has(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return (self.path / stage).is_dir()

    def directory(self, stage: str) -> Path:
        """Where a finished stage lies."""
        return self.path / stage

    def result(self, stage: str) -> dict[str, Any]:
        """The JSON object that a finished stage left."""
        return read_json(self.path / stage / RESULT_NAME)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Yields a stage to fill; it counts as finished when the block ends without an error."""
        with collective_directory(self.path / name, self._context) as directory:
            stage = Stage(directory)
            yield stage
            if self._context.is_main and stage.result is not None:
                text = json.dumps(stage.result, indent=2, sort_keys=True)
                (directory / RESULT_NAME).write_text(text, encoding="utf-8")
        logger.debug("stage %s is finished", name)

    def remove(self) -> None:
        """Deletes the stages, the job being over."""
        self._context.barrier()
        if self._context.is_main:
            remove_directory(self.path)


class Stage:
    """A stage that is being worked on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Where its files go; shared by all processes."""
        self.result: dict[str, Any] | None = None
        """A JSON object to keep with it; the main process's counts."""


def _holds_run(path: Path) -> bool:
    """Whether a run is there; an empty directory is as good as none.

    Raises:
        CheckpointError: Something else is there.
    """
    if (path / IDENTITY_NAME).is_file():
        return True
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            "is in the way of the stages, and no run left it",
            where=path,
            found=f"no {IDENTITY_NAME}",
            hint="give another output, or remove it yourself",
        )
    return False


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield f"{path} was {before!r} and is now {now!r}"
