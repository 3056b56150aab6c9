from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slimtron_common import atomic
from slimtron_common.atomic import (
    MANIFEST_NAME,
    atomic_directory,
    atomic_write,
    check_writable,
    publish_directory,
    remove_directory,
)
from slimtron_common.errors import CheckpointError

SWAPS = [
    pytest.param(True, id="exchange"),
    pytest.param(False, id="two renames"),
]


def write(directory: Path, content: str) -> None:
    """Writes a directory that passes for an output of Slimtron."""
    (directory / "deep").mkdir()
    (directory / MANIFEST_NAME).write_text(content)
    (directory / "a.txt").write_text(content)
    (directory / "deep" / "b.txt").write_text(content)


def contents(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file.read_text()
        for file in directory.rglob("*")
        if file.is_file()
    }


def whole(content: str) -> dict[str, str]:
    return {"a.txt": content, "deep/b.txt": content, MANIFEST_NAME: content}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_the_directory_appears_when_the_block_ends(target: Path) -> None:
    with atomic_directory(target) as temporary:
        write(temporary, "new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert contents(target) == whole("new")
    assert os.listdir(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("exchange", SWAPS)
def test_overwriting_replaces_everything(
    target: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    target.mkdir()
    write(target, "old")
    (target / "stale.txt").write_text("old")
    with atomic_directory(target, overwrite=True) as temporary:
        write(temporary, "new")
        assert contents(target) == {**whole("old"), "stale.txt": "old"}
    assert contents(target) == whole("new")
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_state_and_nothing_else(
    target: Path, error: type[BaseException]
) -> None:
    def fail() -> None:
        with atomic_directory(target, overwrite=True) as temporary:
            write(temporary, "new")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(target.parent) == []
    target.mkdir()
    write(target, "old")
    with pytest.raises(error):
        fail()
    assert contents(target) == whole("old")
    assert os.listdir(target.parent) == ["out"]


def test_an_empty_directory_is_as_good_as_none(target: Path) -> None:
    target.mkdir()
    with atomic_directory(target) as temporary:
        write(temporary, "new")
    assert contents(target) == whole("new")


def test_a_directory_made_meanwhile_is_not_replaced(target: Path) -> None:
    def work() -> None:
        with atomic_directory(target) as temporary:
            write(temporary, "new")
            target.mkdir()
            write(target, "theirs")

    with pytest.raises(CheckpointError, match="meanwhile"):
        work()
    assert contents(target) == whole("theirs")


def test_somebody_elses_directory_made_meanwhile_is_not_replaced(target: Path) -> None:
    def work() -> None:
        with atomic_directory(target, overwrite=True) as temporary:
            write(temporary, "new")
            target.mkdir()
            (target / "thesis.tex").write_text("theirs")

    with pytest.raises(CheckpointError, match="no output of Slimtron"):
        work()
    assert contents(target) == {"thesis.tex": "theirs"}
    assert os.listdir(target.parent) == ["out"]


def test_a_symbolic_link_stays_one(target: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    write(real, "old")
    target.symlink_to(real)
    with atomic_directory(target, overwrite=True) as temporary:
        write(temporary, "new")
    assert target.is_symlink()
    assert contents(real) == whole("new")


def test_leftovers_of_the_living_and_of_other_machines_are_left_alone(target: Path) -> None:
    with atomic_directory(target) as mine:
        write(mine, "a")
        stranger = mine.with_name(mine.name.replace(".tmp-", ".tmp-elsewhere-"))
        stranger.mkdir()
        with atomic_directory(target) as theirs:
            assert mine.is_dir()
            write(theirs, "b")
        target.rename(target.with_name("first"))
    assert stranger.is_dir()
    assert contents(target) == whole("a")


# Kills itself at the `spot`-th step after the start: audit events precede every change that Python
# makes to the file system.
CHILD = """
    import os, signal, sys
    sys.path.insert(0, {source!r})
    from pathlib import Path
    from slimtron_common import atomic

    target = Path({target!r})
    if not {exchange}:
        atomic._exchange = lambda *_: False
    steps = 0

    def count(event, _):
        global steps
        if event.startswith(("open", "os.", "shutil.", "ctypes.", "pathlib.")):
            steps += 1
            if steps == {spot}:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
"""
WRITE = """
    with atomic.atomic_directory(target, overwrite=True) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "slimtron.json").write_text("new")
        (temporary / "a.txt").write_text("new")
        (temporary / "deep" / "b.txt").write_text("new")
"""
PUBLISH = """
    atomic.publish_directory(target.with_name("work") / "export", target, overwrite=True)
"""
REMOVE = """
    atomic.remove_directory(target)
"""


def run_killed(target: Path, spot: int, work: str, *, exchange: bool = True) -> bool:
    """Returns whether the child was killed; False: it had fewer steps than `spot`."""
    source = str(Path(atomic.__file__).parent.parent)
    program = textwrap.dedent(CHILD + work).format(
        source=source, target=str(target), exchange=exchange, spot=spot
    )
    child = subprocess.run([sys.executable, "-S", "-c", program], check=False)
    assert child.returncode in (0, -signal.SIGKILL)
    return child.returncode != 0


@pytest.mark.parametrize("exchange", SWAPS)
@pytest.mark.parametrize("overwriting", [False, True])
def test_a_kill_at_any_step_leaves_all_or_nothing(
    tmp_path: Path, exchange: bool, overwriting: bool
) -> None:
    seen = set()
    spot = 1
    while True:
        target = tmp_path / f"{spot}" / "out"
        target.parent.mkdir()
        if overwriting:
            target.mkdir()
            write(target, "old")
        killed = run_killed(target, spot, WRITE, exchange=exchange)
        if target.exists():
            assert contents(target) in (whole("old"), whole("new"))
        else:
            # Between the two renames, where the file system has no exchange.
            assert not (overwriting and exchange)

        with pytest.raises(ZeroDivisionError), atomic_directory(target, overwrite=True):
            raise ZeroDivisionError
        after = contents(target)
        seen.add(after.get("a.txt"))
        assert after in (whole("old") if overwriting else {}, whole("new"))
        assert os.listdir(target.parent) == ["out"] * target.exists()
        if not killed:
            break
        spot += 1
    assert spot > 10
    assert after == whole("new")
    assert seen == {"old" if overwriting else None, "new"}


@pytest.mark.parametrize("overwriting", [False, True])
def test_a_kill_at_any_step_of_publishing_leaves_the_new_directory_somewhere(
    tmp_path: Path, overwriting: bool
) -> None:
    spot = 1
    while True:
        target = tmp_path / f"{spot}" / "out"
        work = target.with_name("work") / "export"
        work.mkdir(parents=True)
        write(work, "new")
        if overwriting:
            target.mkdir()
            write(target, "old")
        killed = run_killed(target, spot, PUBLISH)
        if work.exists():
            assert contents(work) == whole("new")
            assert contents(target) in (whole("old") if overwriting else {}, {})
            publish_directory(work, target, overwrite=overwriting)
        assert contents(target) == whole("new")
        if not killed:
            break
        spot += 1
    assert spot > 5
    assert sorted(os.listdir(target.parent)) == ["out", "work"]


def test_a_kill_at_any_step_of_removing_leaves_all_or_nothing(tmp_path: Path) -> None:
    spot = 1
    while True:
        target = tmp_path / f"{spot}" / "out"
        target.mkdir(parents=True)
        write(target, "old")
        killed = run_killed(target, spot, REMOVE)
        if target.exists():
            assert contents(target) == whole("old")
            remove_directory(target)
        with atomic_directory(target):
            assert len(os.listdir(target.parent)) == 1
        if not killed:
            break
        spot += 1
    assert spot > 5


def test_somebody_elses_directory_is_not_replaced(target: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write(work, "new")
    target.mkdir()
    (target / "thesis.tex").write_text("theirs")
    with pytest.raises(CheckpointError, match="no output of Slimtron") as caught:
        check_writable(target, overwrite=True)
    assert caught.value.found == "no slimtron.json"
    with (
        pytest.raises(CheckpointError, match="no output of Slimtron"),
        atomic_directory(target, overwrite=True),
    ):
        pytest.fail("the block must not start")
    with pytest.raises(CheckpointError, match="no output of Slimtron"):
        publish_directory(work, target, overwrite=True)
    assert contents(target) == {"thesis.tex": "theirs"}
    assert contents(work) == whole("new")
    assert sorted(os.listdir(tmp_path)) == ["out", "work"]


def test_publishing_does_not_overwrite_unasked(target: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for directory, content in ((work, "new"), (target, "old")):
        directory.mkdir()
        write(directory, content)
    with pytest.raises(CheckpointError, match="exists already"):
        publish_directory(work, target)
    assert (contents(work), contents(target)) == (whole("new"), whole("old"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    atomic_write(file, "é")
    assert file.read_bytes() == "é".encode()
    atomic_write(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    with pytest.raises(UnicodeEncodeError):
        atomic_write(file, "\ud800")
    assert file.read_bytes() == b"\x00"
    assert os.listdir(tmp_path) == ["a.json"]


def test_check_writable_accepts_what_can_be_written(target: Path) -> None:
    check_writable(target, overwrite=False, required_bytes=1)
    target.mkdir()
    check_writable(target, overwrite=False)
    write(target, "old")
    check_writable(target, overwrite=True)


def test_check_writable_refuses_early(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(path: Path, *, overwrite: bool = False, required: int | None = None) -> str:
        with pytest.raises(CheckpointError) as caught:
            check_writable(path, overwrite=overwrite, required_bytes=required)
        return str(caught.value)

    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refusal(file, overwrite=True)
    assert "file is not a directory" in refusal(file / "out")
    assert "does not exist" in refusal(tmp_path / "absent" / "out")
    assert "too little space" in refusal(target, required=2**80)
    assert "mount point" in refusal(Path("/proc"), overwrite=True)
    target.mkdir()
    write(target, "old")
    assert "--overwrite" in refusal(target)
    monkeypatch.chdir(target / "deep")
    assert "the current directory" in refusal(target, overwrite=True)


@pytest.mark.skipif(
    not Path("/proc/sys").exists() or os.access("/proc/sys", os.W_OK),
    reason="needs a directory that not even root can write",
)
def test_check_writable_refuses_a_parent_that_cannot_be_written() -> None:
    with pytest.raises(CheckpointError, match="/proc/sys is not writable"):
        check_writable(Path("/proc/sys/out"), overwrite=False)
