"""What a training tells: a line of JSON for each step, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TrainingLog", "read_log"]


class TrainingLog:
    """Writes records of steps; the main process has one.

    Args:
        path: The file, one JSON object a line.
        step: Steps that are done: records of later ones, from a run that was ended after its last
            checkpoint, are removed.
        tensorboard: A directory for event files, or None.
    """

    def __init__(self, path: Path, *, step: int, tensorboard: Path | None = None) -> None:
        kept = [record for record in read_log(path) if record["step"] <= step]
        path.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Adds a record.

        Args:
            step: The step that it is of.
            **values: JSON values; numbers also go to TensorBoard.
        """
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a log, but for a last line that was not written to its end."""
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
