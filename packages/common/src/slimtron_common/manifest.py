"""`slimtron.json`: what made an output, and checksums of all that is in it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtron_common.atomic import MANIFEST_NAME, atomic_write, recover
from slimtron_common.errors import CheckpointError
from slimtron_common.integrations.versions import installed_versions

__all__ = [
    "MANIFEST_NAME",
    "FileRecord",
    "Manifest",
    "environment_versions",
    "read_manifest",
    "verify_manifest",
    "write_manifest",
]

_FORMAT = 1
_DISTRIBUTIONS = (
    "slimtron-common",
    "slimtron-quant",
    "slimtron-prune",
    "slimtron-distill",
    "torch",
    "megatron-core",
    "nvidia-modelopt",
    "transformers",
    "nemo-toolkit",
    "transformer-engine",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """The size and checksum of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What made an output. The same job in the same environment makes the same manifest."""

    format: int
    """The version of this layout."""
    kind: str
    """What the output is, e.g. ``quantized-checkpoint``."""
    config: dict[str, Any]
    """The config, resolved."""
    metrics: dict[str, Any]
    """What was measured; numbers that are not finite are strings."""
    seed: int | None
    versions: dict[str, str]
    """Python and the distributions that computed it."""
    files: dict[str, FileRecord]
    """Path relative to the directory, with slashes, to the file that is there."""


def environment_versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed distributions that make an output."""
    return {"python": platform.python_version(), **installed_versions(_DISTRIBUTIONS)}


def write_manifest(
    directory: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    seed: int | None,
) -> None:
    """Writes `slimtron.json`, after everything else that belongs into ``directory``.

    Args:
        directory: The output; every other file in it is hashed.
        kind: What the output is.
        config: The resolved config, of JSON values.
        metrics: What was measured, of JSON values.
        seed: The seed of the job, if it draws anything.
    """
    from pydantic_core import to_json

    # What a killed writer left is gone once this is written, and must not be listed.
    recover(directory / MANIFEST_NAME)
    manifest = Manifest(
        format=_FORMAT,
        kind=kind,
        config=dict(config),
        metrics=dict(metrics),
        seed=seed,
        versions=environment_versions(),
        files=_hash_files(directory, _list_files(directory)),
    )
    # JSON has no infinities; a diverged metric must not lose the output it describes.
    values = json.loads(to_json(asdict(manifest), inf_nan_mode="strings"))
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    atomic_write(directory / MANIFEST_NAME, text + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Reads `slimtron.json` without looking at the files it describes.

    Raises:
        CheckpointError: There is none, or it is not one that this version can read.
    """
    from pydantic import TypeAdapter, ValidationError

    file = directory / MANIFEST_NAME
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError("cannot be read", where=file, found=error.strerror) from error
    try:
        manifest = TypeAdapter(Manifest).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"is not a manifest: {field}: {first['msg']}" if field else "is not JSON", where=file
        ) from error
    if manifest.format != _FORMAT:
        raise CheckpointError(
            "is of another format",
            where=file,
            found=manifest.format,
            allowed=_FORMAT,
            hint="read it with the version of slimtron-common that it names",
        )
    return manifest


def verify_manifest(directory: Path) -> Manifest:
    """Reads `slimtron.json` and compares every file with it.

    Raises:
        CheckpointError: As `read_manifest`, or a file is missing, extra or changed; the first of
            them is named.
    """
    manifest = read_manifest(directory)
    names = _list_files(directory)
    for problem, odd in (
        ("is missing", manifest.files.keys() - set(names)),
        ("is not in the manifest", set(names) - manifest.files.keys()),
    ):
        for name in sorted(odd)[:1]:
            raise CheckpointError(problem, where=directory / name)
    for name in names:
        size, expected = (directory / name).stat().st_size, manifest.files[name].bytes
        if size != expected:
            raise CheckpointError(
                "has changed", where=directory / name, found=f"{size} B", allowed=f"{expected} B"
            )
    for name, record in _hash_files(directory, names).items():
        expected_sha256 = manifest.files[name].sha256
        if record.sha256 != expected_sha256:
            raise CheckpointError(
                "has changed",
                where=directory / name,
                found=f"SHA-256 {record.sha256}",
                allowed=f"SHA-256 {expected_sha256}",
            )
    return manifest


def _list_files(directory: Path) -> list[str]:
    return sorted(
        Path(folder, name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory)
        for name in names
        if Path(folder, name) != directory / MANIFEST_NAME
    )


def _hash_files(directory: Path, names: list[str]) -> dict[str, FileRecord]:
    # Hashing releases the interpreter lock, and one core is slower than most disks.
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_hash_file, [directory / n for n in names]), strict=True))


def _hash_file(file: Path) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return FileRecord(bytes=size, sha256=digest.hexdigest())
