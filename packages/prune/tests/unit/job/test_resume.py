"""Runs that end at any stage, and go on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slimtron_common.workdir import WorkDir
from slimtron_prune.__main__ import main

Arguments = Callable[..., list[str]]


def contents(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Interrupts the job after so many stages; returns the list of those that were finished."""
    original = WorkDir.stage

    def arm(count: int) -> list[str]:
        begun: list[str] = []

        def counted(self: WorkDir, name: str) -> object:
            if len(begun) == count:
                raise KeyboardInterrupt
            begun.append(name)
            return original(self, name)

        monkeypatch.setattr(WorkDir, "stage", counted)
        return begun

    return arm


@pytest.mark.parametrize(
    "more",
    [("--hidden-size", "48"), ("--target-ratio", "0.8", "--candidates", "2")],
    ids=["sizes", "search"],
)
def test_a_resumed_job_has_the_same_bytes(
    more: tuple[str, ...],
    arguments: Arguments,
    dies_after: Callable[[int], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    stages = dies_after(1000)
    assert main(arguments("run", *more)) == 0
    undisturbed, expected = contents(out), list(stages)
    shutil.rmtree(out)
    done: list[str] = []
    for _ in expected:
        begun = dies_after(1)
        code = main(arguments("run", *more, *(["--resume"] if done else [])))
        # Nothing that was finished is done again.
        assert not set(begun) & set(done)
        done += begun
        assert code == (0 if len(done) == len(expected) else 130)
    assert done == expected
    assert contents(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scoring_goes_on(
    arguments: Arguments, dies_after: Callable[[int], list[str]], tiny_model: Path, tmp_path: Path
) -> None:
    command = [
        *("score", "--model", f"hf:{tiny_model}", "--out", str(tmp_path / "out")),
        *("--data", "pydoc", "--score-tokens", "128", "--score-seq-len", "32", "--device", "cpu"),
    ]
    dies_after(2)
    assert main(command) == 130
    assert main(command) == 2
    begun = dies_after(1000)
    assert main([*command, "--resume"]) == 0
    assert begun == ["scores-3-of-4", "scores-4-of-4", "output"]
    resumed = contents(tmp_path / "out")
    assert main([*command, "--overwrite"]) == 0
    assert contents(tmp_path / "out") == resumed


def test_other_settings_are_no_continuation(
    arguments: Arguments,
    dies_after: Callable[[int], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dies_after(1)
    assert main(arguments("run", "--num-layers", "3")) == 130
    dies_after(1000)
    assert main(arguments("run", "--num-layers", "2", "--resume")) == 2
    assert "target_num_layers was 3 and is now 2" in capsys.readouterr().err
