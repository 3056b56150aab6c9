"""A report on the disk: report.json for programs, report.html for people."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from slimtron_common.atomic import atomic_write
from slimtron_common.report.comparison import Comparison
from slimtron_common.report.page import render_page

__all__ = ["FORMAT_VERSION", "HTML_NAME", "JSON_NAME", "to_json", "write_report"]

JSON_NAME = "report.json"
HTML_NAME = "report.html"
FORMAT_VERSION = 1


def write_report(directory: Path, comparison: Comparison) -> Path:
    """Writes ``report.json`` and ``report.html``, each whole or not at all.

    The same comparison gives the same bytes: neither time nor machine is written.

    Args:
        directory: Where to write; it exists.
        comparison: What to report.

    Returns:
        The path of ``report.html``.
    """
    page = directory / HTML_NAME
    atomic_write(directory / JSON_NAME, to_json(comparison))
    # Text from elsewhere may hold halves of surrogate pairs, which are no characters.
    atomic_write(page, render_page(comparison).encode(errors="replace"))
    return page


def to_json(comparison: Comparison) -> str:
    """A comparison as JSON that keeps every number exactly.

    JSON has no NaN and no infinity: they become ``{"__float__": "nan"}``, ``"inf"`` or ``"-inf"``.
    """
    content = {"slimtron_report": FORMAT_VERSION, **dataclasses.asdict(comparison)}
    return json.dumps(_encode(content), indent=1, allow_nan=False) + "\n"


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value
