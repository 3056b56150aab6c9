from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from slimtron_common.logging import setup_logging

LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    for name in ("slimtron_quant.run", "megatron.core"):
        for level in LEVELS:
            logging.getLogger(name).log(level, "%s of %s", logging.getLevelName(level), name)
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.split(maxsplit=2)[2] for line in captured.err.splitlines()]


@pytest.mark.parametrize(
    ("verbosity", "rank", "ours", "theirs"),
    [
        (0, 0, "INFO", "WARNING"),
        (1, 0, "DEBUG", "INFO"),
        (2, 0, "DEBUG", "DEBUG"),
        (9, 0, "DEBUG", "DEBUG"),
        (-1, 0, "WARNING", "WARNING"),
        (-2, 0, "ERROR", "ERROR"),
        (0, 3, "WARNING", "WARNING"),
        (2, 3, "WARNING", "WARNING"),
        (-2, 3, "ERROR", "ERROR"),
    ],
)
def test_what_each_verbosity_shows(
    verbosity: int, rank: int, ours: str, theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(verbosity, rank)
    who = f"[rank {rank}] " if rank else ""
    names = [logging.getLevelName(level) for level in LEVELS]
    assert lines(capsys) == [
        *(f"{who}{name} of slimtron_quant.run" for name in names[names.index(ours) :]),
        *(f"{who}{name} of megatron.core" for name in names[names.index(theirs) :]),
    ]


def test_setting_up_again_replaces_and_leaves_the_handlers_of_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = logging.NullHandler()
    logging.getLogger().addHandler(theirs)
    setup_logging(0)
    setup_logging(-2)
    assert lines(capsys) == ["ERROR of slimtron_quant.run", "ERROR of megatron.core"]
    assert theirs in logging.getLogger().handlers
