"""Outputs that appear whole or not at all, whenever the process dies.

Everything is written into a sibling of the target, flushed to the disk, and then renamed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtron_common.errors import CheckpointError

__all__ = [
    "MANIFEST_NAME",
    "atomic_directory",
    "atomic_write",
    "check_writable",
    "publish_directory",
    "recover",
    "remove_directory",
]

MANIFEST_NAME = "slimtron.json"
"""The file that tells an output of Slimtron from somebody's data."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_writable(path: Path, *, overwrite: bool, required_bytes: int | None = None) -> None:
    """Checks, before any work is done, that a directory can be written at ``path``.

    An empty directory that exists already is as good as none. One with content is replaced only
    if it has a manifest: it is then an output of Slimtron.

    Args:
        path: Where the output directory will be.
        overwrite: Whether an output there may be replaced.
        required_bytes: How much will be written; the old directory is there until the end.

    Raises:
        CheckpointError: Something is there already, the parent is missing or cannot be written,
            or the disk has too little space.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise CheckpointError("is a file, not a directory", where=path)
    if Path.cwd().is_relative_to(path):
        raise CheckpointError("is, or holds, the current directory", where=path)
    if path.is_mount():
        raise CheckpointError(
            "is a mount point, which cannot be replaced as a whole",
            where=path,
            hint=f"write to a directory inside it: {path / 'output'}",
        )
    if path.exists() and not overwrite and any(path.iterdir()):
        raise CheckpointError(
            "exists already", where=path, hint="give another path, or --overwrite to replace it"
        )
    _check_replaceable(path)
    parent = path.parent
    if not parent.is_dir():
        state = "is not a directory" if parent.exists() else "does not exist"
        raise CheckpointError(f"cannot be created: {parent} {state}", where=path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot be created: {parent} is not writable", where=path)
    free = shutil.disk_usage(parent).free
    if required_bytes is not None and free < required_bytes:
        raise CheckpointError(
            "the disk has too little space",
            where=path,
            found=f"{free / 2**30:.2f} GiB free",
            allowed=f"{required_bytes / 2**30:.2f} GiB or more",
        )


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``path`` when the block ends without an error.

    After an error the temporary directory is removed and what was at ``path`` is still there. A
    process that is killed leaves a hidden sibling, which the next call for the same path removes.

    Replacing a directory swaps the two in one step where the file system can (Linux: ext4, XFS,
    Btrfs, tmpfs). Elsewhere (NFS, Lustre) there is a moment between two renames: a process killed
    just then leaves the old directory as a hidden sibling, and the next call puts it back.

    In a run of several processes, one of them calls this.

    Args:
        path: The directory to write; its parent exists.
        overwrite: Whether an output of Slimtron may be replaced.

    Yields:
        The temporary directory, empty, on the file system of ``path``.

    Raises:
        CheckpointError: As `check_writable`.
    """
    path = path.resolve()
    recover(path)
    check_writable(path, overwrite=overwrite)
    temporary = _sibling(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        _flush_tree(temporary)
        _move_into_place(temporary, path, overwrite=overwrite, exchange=True)
    finally:
        # Holds what was replaced, or what is unfinished.
        shutil.rmtree(temporary, ignore_errors=True)


def publish_directory(source: Path, path: Path, *, overwrite: bool = False) -> None:
    """Moves a finished directory to ``path``; at every moment ``source`` holds it, or ``path``.

    A process that is killed while it replaces a directory may leave the old one as a hidden
    sibling, which the next call for the same path puts back or removes.

    Args:
        source: The directory, on the file system of ``path``.
        path: Its new name; its parent exists.
        overwrite: Whether an output of Slimtron may be replaced.

    Raises:
        CheckpointError: As `check_writable`.
    """
    path = path.resolve()
    recover(path)
    check_writable(path, overwrite=overwrite)
    _flush_tree(source)
    # An exchange would leave the old directory under the name of the finished one.
    _move_into_place(source, path, overwrite=overwrite, exchange=False)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all, replacing the one that is there.

    Args:
        path: The file; its directory exists.
        data: The content; text is written as UTF-8.
    """
    path = path.resolve()
    recover(path)
    temporary = _sibling(path, "tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def remove_directory(path: Path) -> None:
    """Deletes a directory; a process that is killed meanwhile leaves it whole, or a hidden sibling.

    The next `atomic_directory` for the same path removes that sibling.
    """
    path = path.resolve()
    doomed = _sibling(path, "tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def recover(path: Path) -> None:
    """Removes, or puts back, what killed writers of ``path`` on this machine left beside it."""
    for old in _leftovers(path, "old"):
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for temporary in _leftovers(path, "tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def _check_replaceable(path: Path) -> None:
    if path.exists() and any(path.iterdir()) and not (path / MANIFEST_NAME).is_file():
        raise CheckpointError(
            "is no output of Slimtron, and is not replaced",
            where=path,
            found=f"no {MANIFEST_NAME}",
            hint="give another path, or remove it yourself",
        )


def _sibling(path: Path, role: str) -> Path:
    """Returns a new hidden name beside ``path`` that tells which process owns it."""
    owner = f"{socket.gethostname()}-{os.getpid()}"
    return path.with_name(f".{path.name}.{role}-{owner}-{uuid.uuid4().hex[:8]}")


def _leftovers(path: Path, role: str) -> list[Path]:
    """Returns the siblings of ``path`` that dead processes of this machine left behind."""
    head = re.escape(f".{path.name}.{role}-{socket.gethostname()}-")
    matches = (
        re.fullmatch(head + "([0-9]+)-[0-9a-f]{8}", sibling.name)
        for sibling in path.parent.glob(".*")
    )
    return [path.with_name(m.string) for m in matches if m and not _is_alive(int(m[1]))]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _move_into_place(source: Path, path: Path, *, overwrite: bool, exchange: bool) -> None:
    try:
        # Also replaces an empty directory.
        source.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if not overwrite:
            raise CheckpointError("was created by someone else meanwhile", where=path) from error
        _check_replaceable(path)
        if not (exchange and _exchange(source, path)):
            old = _sibling(path, "old")
            path.rename(old)
            try:
                source.rename(path)
            except OSError:
                old.rename(path)
                raise
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two directories in one step; returns False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _flush_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            _flush(Path(folder, name))
        _flush(Path(folder))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
