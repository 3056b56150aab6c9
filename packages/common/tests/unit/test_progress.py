from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from slimtron_common import progress
from slimtron_common.progress import Progress, stage, track

TIME = r"\d+\.\d s"


@pytest.fixture(autouse=True)
def _informed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("RANK", raising=False)


def test_without_a_terminal_lines_are_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_INTERVAL", 0.0)
    assert list(track(range(3), description="calibrating")) == [0, 1, 2]
    first, second, third = caplog.messages
    assert re.fullmatch(rf"calibrating: 1/3, {TIME} elapsed, {TIME} left", first)
    assert re.fullmatch(rf"calibrating: 2/3, {TIME} elapsed, {TIME} left", second)
    assert re.fullmatch(rf"calibrating: 3/3, {TIME} elapsed", third)


def test_fast_work_logs_its_end_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert list(track(iter("ab"), description="reading")) == ["a", "b"]
    (message,) = caplog.messages
    assert re.fullmatch(rf"reading: 2, {TIME} elapsed", message)


def test_work_that_fails_is_not_reported_as_done(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), Progress("searching", 2):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), stage("exporting"):
        raise ZeroDivisionError
    assert caplog.messages == ["exporting ..."]


def test_a_stage_tells_its_beginning_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with stage("exporting"):
        assert caplog.messages == ["exporting ..."]
    assert re.fullmatch(rf"exporting: done in {TIME}", caplog.messages[1])


def test_other_ranks_are_silent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(track([1], description="calibrating")) == [1]
    with stage("exporting"):
        pass
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.0, "59.0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert progress.format_duration(seconds) == text


def test_on_a_terminal_there_is_a_bar_and_log_lines_stay_whole() -> None:
    program = """
import logging
from slimtron_common.logging import setup_logging
from slimtron_common.progress import stage, track
setup_logging(0)
for item in track(range(4), description="outer"):
    for _ in track("ab", description="inner"):
        pass
    with stage(f"stage {item}"):
        pass
"""
    terminal, child_end = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=child_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(child_end)
    output = bytearray()
    while True:
        try:
            output += os.read(terminal, 4096)
        except OSError:  # Linux says so when the other end is closed.
            break
    os.close(terminal)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert "━" in text
    assert "4/4" in text
    for item in range(4):
        assert re.search(rf"INFO stage {item}: done in {TIME}\s*\r?\n", text)
    assert len(re.findall(rf"INFO inner: 2/2, {TIME} elapsed\s*\r?\n", text)) == 4
