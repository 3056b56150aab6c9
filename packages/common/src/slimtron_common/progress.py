"""Progress of long work, on rank 0: a live bar on a terminal, a log line now and then elsewhere.

Shown where the information of this module's logger is.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress", "format_duration", "stage", "track"]

_LOG_INTERVAL = 10.0
"""Seconds between two log lines of one work."""

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class Progress:
    """Shows how far some work has come, while entered.

    Args:
        description: The work, as in "calibrating".
        total: How many steps it has, if that is known.
    """

    _bar_is_shown = False
    """Two live bars would overwrite each other: an inner progress logs."""

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description = description
        self.total = total
        self.completed = 0
        self._logged: int | None = None
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._shown = os.environ.get("RANK", "0") == "0" and _logger.isEnabledFor(logging.INFO)
        self._start = self._last_line = time.monotonic()
        if self._shown and sys.stderr.isatty() and not Progress._bar_is_shown:
            self._bar = _bar()
            self._task = self._bar.add_task(self.description, total=self.total)
            self._bar.start()
            Progress._bar_is_shown = True
        return self

    def advance(self, steps: int = 1) -> None:
        """Tells that ``steps`` more steps are done."""
        self.completed += steps
        if self._bar is not None:
            self._bar.advance(self._task, steps)
        elif self._shown and time.monotonic() - self._last_line >= _LOG_INTERVAL:
            self._last_line = time.monotonic()
            self._log()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            Progress._bar_is_shown = False
        elif self._shown and error is None and self._logged != self.completed:
            self._log()

    def _log(self) -> None:
        self._logged = self.completed
        elapsed = time.monotonic() - self._start
        parts = [f"{self.completed}", f"{format_duration(elapsed)} elapsed"]
        if self.total:
            parts[0] += f"/{self.total}"
            if 0 < self.completed < self.total:
                left = elapsed / self.completed * (self.total - self.completed)
                parts.append(f"{format_duration(left)} left")
        _logger.info("%s: %s", self.description, ", ".join(parts))


def track(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterator[T]:
    """Yields the items of ``iterable``, showing how many are done.

    Args:
        iterable: What to go through.
        total: How many items it has, unless it has a length.
        description: The work, as in "calibrating".
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total) as progress:
        for item in iterable:
            yield item
            progress.advance()


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Logs that a stage of the work begins, and how long it took when it has ended well."""
    shown = os.environ.get("RANK", "0") == "0"
    start = time.monotonic()
    if shown:
        _logger.info("%s ...", description)
    yield
    if shown:
        _logger.info("%s: done in %s", description, format_duration(time.monotonic() - start))


def _bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def format_duration(seconds: float) -> str:
    """Returns seconds as ``4.2 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
