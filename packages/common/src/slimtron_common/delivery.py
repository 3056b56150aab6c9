"""The last step of a job: its finished directory gets report, manifest and name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimtron_common.atomic import publish_directory
from slimtron_common.manifest import MANIFEST_NAME, read_manifest, write_manifest
from slimtron_common.report import Comparison, read_report, write_report

__all__ = ["deliver", "delivered"]


def deliver(
    directory: Path,
    path: Path,
    comparison: Comparison,
    identity: Mapping[str, Any],
    *,
    kind: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Adds report and manifest to a finished directory and gives it its name.

    Args:
        directory: What the job made, complete but for these.
        path: Where it appears, whole or not at all.
        comparison: The report; its last column's metrics go into the manifest.
        identity: What makes the job this job.
        kind: What the directory holds, for the manifest.
        seed: The job's.
        overwrite: Whether an existing output is replaced.

    Raises:
        CheckpointError: ``path`` is taken or cannot be written.
    """
    write_report(directory, comparison)
    metrics = comparison.columns[-1].metrics
    write_manifest(directory, kind=kind, config=dict(identity), metrics=metrics, seed=seed)
    publish_directory(directory, path, overwrite=overwrite)


def delivered(path: Path, identity: Mapping[str, Any]) -> Comparison | None:
    """The report of a job that ended after its output had appeared, or was ended there.

    Returns:
        None if there is no output, or it is another job's.
    """
    if not (path / MANIFEST_NAME).is_file() or read_manifest(path).config != identity:
        return None
    return read_report(path)
