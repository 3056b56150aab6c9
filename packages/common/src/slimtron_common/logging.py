"""Logging of the commands. Libraries only ever call ``logging.getLogger(__name__)``."""

from __future__ import annotations

import logging
import sys

__all__ = ["setup_logging"]


# Python 3.10 cannot subscript StreamHandler.
class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what ``sys.stderr`` is at that moment, for a progress bar replaces it meanwhile."""

    def __init__(self, level: int, level_of_others: int) -> None:
        super().__init__(sys.stderr)
        self._level = level
        self._level_of_others = level_of_others

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.startswith("slimtron_")
        return record.levelno >= (self._level if ours else self._level_of_others)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(verbosity: int, rank: int = 0) -> None:
    """Sends log records to stderr; called again, it replaces what it set up.

    Args:
        verbosity: 0 shows the information of Slimtron and the warnings of everyone, each step up
            one level more of both, each step down one level less.
        rank: Of this process. Other ranks than 0 show warnings at most, and their number.
    """
    level = logging.INFO - 10 * verbosity
    if rank != 0:
        level = max(level, logging.WARNING)
    handler = _StderrHandler(level, max(level, min(level + 10, logging.WARNING)))
    who = f"[rank {rank}] " if rank else ""
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    # What the libraries warn their developers of is no news for who runs a command.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbosity > 0 else logging.ERROR)
