"""The comparison as a table for the terminal, plain in a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimtron_common.report.comparison import Column, Comparison, Metric
from slimtron_common.report.formatting import change, format_value, is_broken

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["print_comparison"]

_MIN_COLUMN_WIDTH = 12
_GAP = 2
_VERDICT_STYLES = {"better": "green", "worse": "red", "neutral": "dim"}


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the models side by side, each with its change from the first.

    Models that do not fit beside each other go into further tables, each with the baseline.

    Args:
        comparison: What to print.
        console: Where to print; None for stdout, coloured only on a terminal.
    """
    from rich.console import Console

    console = console or Console()
    metrics, (baseline, *compared) = comparison.rows(), comparison.columns
    labels = [_plain(f"{m.label} ({m.unit})" if m.unit else m.label) for m in metrics]
    fixed = [_Cells("", labels), _Cells(baseline.name, _values(baseline, metrics))]
    console.print(_plain(comparison.title), style="bold")
    table = list(fixed)
    for column in compared:
        cells = _Cells(column.name, _changes(column, baseline, metrics))
        if len(table) > len(fixed) and _width([*table, cells]) > console.width:
            console.print(_table(table))
            table = list(fixed)
        table.append(cells)
    console.print(_table(table))


@dataclass(frozen=True)
class _Cells:
    """A column of the printed table."""

    name: str
    texts: list[Text]


def _width(columns: list[_Cells]) -> int:
    """Least width of a table in which no number is broken; names above the columns may be."""
    widths = (max(map(len, column.texts), default=0) for column in columns)
    return sum(max(width, _MIN_COLUMN_WIDTH) + _GAP for width in widths)


def _table(columns: list[_Cells]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(_plain(column.name), justify="right" if index else "left", overflow="fold")
    for row in zip(*(column.texts for column in columns), strict=True):
        table.add_row(*row)
    return table


def _values(column: Column, metrics: tuple[Metric, ...]) -> list[Text]:
    from rich.text import Text

    values = [column.metrics.get(metric.key) for metric in metrics]
    return [
        Text(
            format_value(value, metric),
            style="bold red" if is_broken(value) else "dim" if value is None else "",
        )
        for value, metric in zip(values, metrics, strict=True)
    ]


def _changes(column: Column, baseline: Column, metrics: tuple[Metric, ...]) -> list[Text]:
    """Values and their changes as one text, so that the column's name stands above both."""
    from rich.text import Text

    changes = []
    for metric in metrics:
        difference = change(
            column.metrics.get(metric.key), baseline.metrics.get(metric.key), metric
        )
        if difference is None:
            changes.append(Text("-", style="dim"))
        else:
            changes.append(Text(difference.text, style=_VERDICT_STYLES[difference.verdict]))
    width = max((len(text) for text in changes), default=0)
    cells = []
    for value, text in zip(_values(column, metrics), changes, strict=True):
        text.align("right", width)
        cells.append(Text.assemble(value, "  ", text))
    return cells


def _plain(text: str) -> Text:
    """Text from elsewhere, without control codes that the terminal would obey."""
    from rich.text import Text

    return Text("".join(char if char.isprintable() else "?" for char in text))
