"""Reads report.json back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.report.comparison import Comparison
from slimtron_common.report.write import FORMAT_VERSION, JSON_NAME, to_json

__all__ = ["read_report"]


def read_report(path: Path) -> Comparison:
    """Reads the report that `write_report` wrote.

    Args:
        path: ``report.json``, or the directory that holds it.

    Returns:
        The comparison, equal to the one that was written.

    Raises:
        CheckpointError: There is no report, or it is not one that this version wrote.
    """
    from pydantic import TypeAdapter, ValidationError

    file = path / JSON_NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_hook=_decode)
    except OSError as error:
        raise CheckpointError(f"no report can be read: {error.strerror}", where=file) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not a report: {error}", where=file) from error
    version = content.pop("slimtron_report", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            "is not a report that this version of Slimtron can read",
            where=file,
            found=f"slimtron_report = {version!r}",
            allowed=FORMAT_VERSION,
        )
    try:
        comparison = TypeAdapter(Comparison).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"is not a report: {first['msg']}", where=f"{file}: {field}", found=first["input"]
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"is not a report: {error}", where=file) from error
    # Whatever validation dropped or converted would differ when written again.
    if _canonical(to_json(comparison)) != _canonical(text):
        raise CheckpointError("holds fields or values that no report has", where=file)
    return comparison


def _decode(value: dict[str, Any]) -> Any:
    if value.keys() == {"__float__"} and value["__float__"] in ("nan", "inf", "-inf"):
        return float(value["__float__"])
    return value


def _canonical(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)
