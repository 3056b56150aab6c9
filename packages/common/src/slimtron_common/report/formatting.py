"""Numbers and their changes as text, the same in the terminal and on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from slimtron_common.report.comparison import Cell, Metric, Number

__all__ = ["Change", "change", "format_cell", "format_value", "is_broken"]

NOT_MEASURED = "n/a"


@dataclass(frozen=True)
class Change:
    """A difference from the baseline."""

    text: str
    verdict: Literal["better", "worse", "neutral"]


def is_broken(value: Cell) -> bool:
    """Whether a number is NaN or infinite, which no sound model gives."""
    return isinstance(value, float) and not math.isfinite(value)


def format_value(value: Number, metric: Metric) -> str:
    """A measurement with its scale but without the metric's unit (``256.6 MiB``, ``97.31%``)."""
    if value is None:
        return NOT_MEASURED
    if is_broken(value):
        return str(value)
    if metric.format == "bytes":
        return _bytes(value)
    if metric.format == "fraction":
        return _percent(value)
    if metric.format == "count":
        return f"{value:,.0f}"
    return _number(value)


def format_cell(value: Cell) -> str:
    """One cell of a table."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def change(value: Number, baseline: Number, metric: Metric) -> Change | None:
    """How a measurement differs from the baseline's, and whether that is good.

    Fractions differ in percentage points, others in per cent; beyond a factor of 2 up or 10
    down, the factor says more.

    Returns:
        None where there is nothing to compare.
    """
    if value is None or baseline is None or is_broken(value) or is_broken(baseline):
        return None
    if value == baseline:
        return Change("=", "neutral")
    if metric.format == "fraction":
        text = f"{_signed(100 * (value - baseline))} pp"
    elif baseline > 0 and value >= 0:
        ratio = value / baseline
        percent = f"{_signed(100 * (ratio - 1))}%"
        text = percent if 0.1 <= ratio < 2 or value == 0 else f"{_factor(ratio)}x"
    else:
        return None
    if metric.better is None:
        return Change(text, "neutral")
    return Change(text, "better" if (value < baseline) == (metric.better == "lower") else "worse")


def _signed(value: float) -> str:
    digits = ".1f" if abs(value) >= 10 else ".2f" if abs(value) >= 0.1 else ".2g"
    return f"{value:+{digits}}"


def _factor(ratio: float) -> str:
    return f"{ratio:,.0f}" if 1000 <= ratio < 1e7 else f"{ratio:.3g}"


def _number(value: float) -> str:
    """Three decimals, more for small values, fewer for large ones; never rounded to 0."""
    size = abs(value)
    if value == 0 or 1 <= size < 1000:
        return f"{value:.3f}" if value != int(value) else f"{value:.0f}"
    if 1000 <= size < 1e7:
        return f"{value:,.1f}"
    return f"{value:.4g}"


def _percent(value: float) -> str:
    """Two decimals, and as many more as tell it from 0% and 100%."""
    text = f"{value:.2%}"
    return f"{100 * value:.6g}%" if text in ("0.00%", "100.00%") and value not in (0, 1) else text


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
