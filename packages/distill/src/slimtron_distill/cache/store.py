"""How a teacher's largest logits lie on disk.

``cache.json`` says of which teacher and text they are. The text's sequences follow each other in
shards of ``shard_sequences``. ``shard-00000.safetensors`` holds two tensors, ``indices`` (int32)
and ``logits`` (the teacher's type), each ``[n, s, k]``: of every token the ``k`` likeliest entries
of the vocabulary, from the likeliest down. ``shard-00000.json`` has the file's size and SHA-256; it
is written last, so that a shard without it is unfinished and is written again. ``held-out-*`` holds
the teacher's whole logits on the text that models are measured on, by layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slimtron_common.atomic import atomic_write
from slimtron_common.checkpoint.base import read_json
from slimtron_common.checkpoint.writer import save_tensors
from slimtron_common.errors import CheckpointError, ConfigError

__all__ = ["INDEX_NAME", "TeacherCache", "cache_identity"]

INDEX_NAME = "cache.json"
_FORMAT = 1
_SHARD_SEQUENCES = 256


def cache_identity(
    *,
    teacher: Mapping[str, Any],
    text: str,
    held_out: str,
    num_sequences: int,
    seq_length: int,
    vocab_size: int,
    top_k: int,
) -> dict[str, Any]:
    """What ``cache.json`` says.

    Args:
        teacher: Which model it is: JSON values.
        text: Fingerprint of the sequences.
        held_out: Fingerprint of those that models are measured on.
        num_sequences: How many sequences there are.
        seq_length: Tokens that are predicted in each.
        vocab_size: Entries of the vocabulary that the student shares.
        top_k: How many entries are kept of each token.
    """
    return {
        "format": _FORMAT,
        "teacher": dict(teacher),
        "text": text,
        "held_out": held_out,
        "num_sequences": num_sequences,
        "seq_length": seq_length,
        "vocab_size": vocab_size,
        "top_k": top_k,
        "shard_sequences": _SHARD_SEQUENCES,
    }


class TeacherCache:
    """A cache that exists, finished or not.

    Args:
        directory: Where it lies, on storage that all processes share.

    Raises:
        CheckpointError: There is none, or it is of another format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.identity = read_json(directory / INDEX_NAME)
        if self.identity.get("format") != _FORMAT:
            raise CheckpointError(
                "is of another format",
                where=directory / INDEX_NAME,
                found=self.identity.get("format"),
                allowed=_FORMAT,
            )
        self._open: dict[int, Any] = {}

    @classmethod
    def create(cls, directory: Path, identity: Mapping[str, Any]) -> TeacherCache:
        """Makes a cache where there is none, and opens it; one process calls this first."""
        directory.mkdir(exist_ok=True)
        if not (directory / INDEX_NAME).exists():
            atomic_write(directory / INDEX_NAME, json.dumps(identity, indent=2))
        return cls(directory)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuses a cache of another teacher, text or size.

        Raises:
            ConfigError: With what differs.
        """
        differing = [name for name in identity if self.identity.get(name) != identity[name]]
        if differing:
            raise ConfigError(
                "the teacher's cache was made of something else",
                where=self.directory,
                found=", ".join(f"{name} {self.identity.get(name)}" for name in differing),
                allowed=", ".join(f"{name} {identity[name]}" for name in differing),
                hint="give another directory, or the settings that it was made with",
            )

    @property
    def num_shards(self) -> int:
        """Shards that a finished cache has."""
        return len(range(0, self.identity["num_sequences"], self.identity["shard_sequences"]))

    def rows(self, shard: int) -> range:
        """The sequences of a shard."""
        size = self.identity["shard_sequences"]
        return range(shard * size, min((shard + 1) * size, self.identity["num_sequences"]))

    def missing(self) -> list[int]:
        """Shards that are not there, or not finished."""
        return [i for i in range(self.num_shards) if not self._paths(i)[1].is_file()]

    def write(self, shard: int, indices: Tensor, logits: Tensor) -> None:
        """Writes a shard.

        Args:
            shard: Its number.
            indices: ``[n, s, k]`` integer.
            logits: ``[n, s, k]``, the teacher's there.
        """
        data, sidecar = self._paths(shard)
        tensors = {"indices": indices.int().cpu(), "logits": logits.cpu().contiguous()}
        save_tensors(data, tensors)
        atomic_write(sidecar, json.dumps(_checksum(data)))

    def verify(self) -> None:
        """Compares every file with its checksum.

        Raises:
            CheckpointError: A shard is missing or has changed.
        """
        for shard in range(self.num_shards):
            data, sidecar = self._paths(shard)
            expected = read_json(sidecar)
            found = _checksum(data) if data.is_file() else None
            if found != expected:
                raise CheckpointError(
                    "a shard of the teacher's cache is damaged",
                    where=data,
                    found=found,
                    allowed=expected,
                    hint=f"delete {sidecar.name}, and a run with the teacher writes it again",
                )

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Reads sequences, on the CPU.

        Args:
            rows: ``[b]``, which of the text's sequences.

        Returns:
            Indices (int64) and logits, each ``[b, s, k]``.
        """
        size = self.identity["shard_sequences"]
        parts = []
        for row in rows.tolist():
            file = self._file(row // size)
            parts.append([file.get_slice(name)[row % size] for name in ("indices", "logits")])
        indices, logits = (torch.stack(column) for column in zip(*parts, strict=True))
        return indices.long(), logits

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self._paths(shard)[0], framework="pt")
        return self._open[shard]

    def _paths(self, shard: int) -> tuple[Path, Path]:
        name = f"shard-{shard:05d}"
        return self.directory / f"{name}.safetensors", self.directory / f"{name}.json"


def _checksum(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
