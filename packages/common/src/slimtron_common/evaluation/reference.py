"""The original model's logits, kept on disk so that the original need not stay in memory.

Each process keeps its own shard: ``<rank_key>.logits``, the batches one after the other as raw
bytes, and ``<rank_key>.json``, which describes them. The description is written last: without it
the recording is unfinished and is refused. Hidden states are kept in the same way.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from slimtron_common.atomic import atomic_write
from slimtron_common.errors import CheckpointError

__all__ = ["ReferenceReader", "ReferenceWriter", "comparison_bytes", "reference_bytes"]


def reference_bytes(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Disk space that a recording takes, over all processes, in bytes."""
    return num_tokens * vocab_size * dtype.itemsize


def comparison_bytes(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Memory that comparing a batch takes beside the logits and their float32 copy, in bytes.

    A recording and the one before it, and two more float32 temporaries.
    """
    return 2 * reference_bytes(num_tokens, vocab_size, dtype) + 8 * num_tokens * vocab_size


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where one batch lies in the file, and how to know it again."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    crc32: int


class ReferenceWriter:
    """Records logits batch by batch; a context manager.

    The recording counts as finished only when the block ends without an error. What an earlier
    recording of the same shard left is replaced.

    Args:
        directory: Where the recording goes; created if missing.
        rank_key: Names this process's shard (``tp0-cp0-dp1``); unique among the processes.
        contents: What is recorded, where it is not logits.

    Raises:
        CheckpointError: The disk is full or cannot be written.
    """

    def __init__(self, directory: Path, rank_key: str, *, contents: str = "logits") -> None:
        self._contents = contents
        self._data, self._index = _paths(directory, rank_key, contents)
        self._batches: list[dict[str, object]] = []
        self._file: BinaryIO

    def __enter__(self) -> ReferenceWriter:
        try:
            self._data.parent.mkdir(parents=True, exist_ok=True)
            self._index.unlink(missing_ok=True)
            self._file = self._data.open("wb")
        except OSError as error:
            raise _write_error(self._data, error, self._contents) from error
        return self

    def append(self, logits: Tensor) -> None:
        """Writes one batch in its own dtype.

        Args:
            logits: ``[b, s, v/tp]``, any device; sizes and dtype may differ between batches.
        """
        raw = _bytes_of(logits.detach().cpu().contiguous())
        try:
            self._file.write(raw)
        except OSError as error:
            raise _write_error(self._data, error, self._contents) from error
        self._batches.append(
            {
                "dtype": str(logits.dtype).removeprefix("torch."),
                "shape": list(logits.shape),
                "crc32": zlib.crc32(raw),
            }
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
            if error is None:
                atomic_write(self._index, json.dumps({"batches": self._batches}))
        except OSError as failure:
            raise _write_error(self._data, failure, self._contents) from failure
        finally:
            if not self._index.exists():
                self._data.unlink(missing_ok=True)


class ReferenceReader:
    """Reads a recording back, one batch at a time.

    Iterating gives the batches in the order in which they were recorded.

    Args:
        directory: Where the recording is.
        rank_key: The shard, as it was named when it was recorded.
        contents: What was recorded, where it is not logits.

    Raises:
        CheckpointError: The recording is missing, unfinished, truncated or not readable.
    """

    def __init__(self, directory: Path, rank_key: str, *, contents: str = "logits") -> None:
        self._contents = contents
        self._data, index = _paths(directory, rank_key, contents)
        self._batches = _read_index(index, contents)
        try:
            found = self._data.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"the recorded {self._contents} cannot be read: {error}", where=self._data
            ) from error
        expected = sum(batch.num_bytes for batch in self._batches)
        if found != expected:
            raise CheckpointError(
                f"the recorded {self._contents} are truncated or changed",
                where=self._data,
                found=f"{found} bytes",
                allowed=f"{expected} bytes",
            )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int, *, like: Tensor | None = None) -> Tensor:
        """Reads one batch.

        Args:
            index: Which batch, from 0.
            like: The logits to compare it with: its shape must be theirs, and it goes to their
                device.

        Returns:
            ``[b, s, v/tp]`` in the dtype in which it was recorded.

        Raises:
            CheckpointError: There is no such batch, its shape is another, or its bytes changed.
        """
        if index >= len(self):
            raise CheckpointError(
                "the recording has fewer batches than the data",
                where=self._data,
                found=len(self),
                hint="record again on the same data",
            )
        batch = self._batches[index]
        if like is not None and batch.shape != tuple(like.shape):
            raise CheckpointError(
                f"batch {index} was recorded in another shape",
                where=self._data,
                found=batch.shape,
                allowed=tuple(like.shape),
                hint="record again on the same data in the same parallel layout",
            )
        logits = torch.empty(batch.shape, dtype=batch.dtype)
        raw = _bytes_of(logits)
        try:
            with self._data.open("rb") as file:
                file.seek(batch.offset)
                num_read = file.readinto(raw)
        except OSError as error:
            raise CheckpointError(
                f"the recorded {self._contents} cannot be read: {error}", where=self._data
            ) from error
        if num_read != batch.num_bytes or zlib.crc32(raw) != batch.crc32:
            raise CheckpointError(f"batch {index} is corrupt", where=self._data)
        return logits if like is None else logits.to(like.device)


def _paths(directory: Path, rank_key: str, contents: str) -> tuple[Path, Path]:
    return directory / f"{rank_key}.{contents.replace(' ', '-')}", directory / f"{rank_key}.json"


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; writing to it changes the tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_index(path: Path, contents: str) -> list[_Batch]:
    try:
        entries = json.loads(path.read_bytes())["batches"]
        batches: list[_Batch] = []
        offset = 0
        for entry in entries:
            dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
            num_bytes = shape.numel() * dtype.itemsize
            batches.append(_Batch(dtype, tuple(shape), offset, num_bytes, entry["crc32"]))
            offset += num_bytes
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no finished recording of the {contents}",
            where=path,
            hint="record it again: it is missing, or was interrupted",
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the recording's description cannot be read: {error!r}", where=path
        ) from error
    return batches


def _write_error(path: Path, error: OSError, contents: str) -> CheckpointError:
    return CheckpointError(
        f"the {contents} cannot be recorded: {error.strerror}",
        where=path,
        hint="free space on this disk, or take fewer tokens",
    )
