"""Write a safetensors file tensor by tensor, with none of them in memory afterwards.

The file is the one that the safetensors library would have written, byte for byte: tensors in
the order of their types and names behind a header that tells where each is. The header is known
last, so the tensors go to a second file first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

__all__ = ["SafetensorsWriter"]

_DTYPES = (
    "uint64", "int64", "float64", "complex64", "float32", "uint32", "int32", "bfloat16",
    "float16", "uint16", "int16", "float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2", "int8",
    "uint8", "bool",
)  # fmt: skip
_NAMES = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""torch's and the format's names of types, in the order of the file."""

_ALIGNMENT = 8
_COPIED_AT_ONCE = 2**24


class SafetensorsWriter:
    """A file that appears when the block ends without an error; a context manager.

    Args:
        path: The file; next to it lies the second one meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spool_path = path.with_name(f"{path.name}.tensors")
        self._tensors: dict[str, tuple[int, list[int], int, int]] = {}
        self.num_bytes = 0
        """Size of the tensors so far."""

    def __enter__(self) -> SafetensorsWriter:
        self._spool = self._spool_path.open("w+b")
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor of any type and device."""
        raw = tensor.detach().to("cpu").contiguous()
        kind = _DTYPES.index(str(raw.dtype).removeprefix("torch."))
        size = raw.numel() * raw.element_size()
        if size:
            self._spool.write(raw.view(-1).view(torch.uint8).numpy().data)
        self._tensors[name] = (kind, list(raw.shape), self.num_bytes, size)
        self.num_bytes += size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._write()
        finally:
            self._spool.close()
            self._spool_path.unlink()

    def _write(self) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(self._tensors.items(), key=lambda item: (item[1][0], item[0]))
        end = 0
        for name, (kind, shape, _, size) in ordered:
            offsets = [end, end := end + size]
            header[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        with self._path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, (_, _, start, size) in ordered:
                self._spool.seek(start)
                _copy(self._spool, file, size)
            file.flush()
            os.fsync(file.fileno())


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, _COPIED_AT_ONCE))
        target.write(piece)
        size -= len(piece)
