"""The comparison as a table for the terminal, plain in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimtron_common.report.comparison import Column, Comparison, Metric
from slimtron_common.report.formatting import change, format_value, is_broken

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["print_comparison"]

_LABEL_AND_BASELINE_WIDTH = 34
_COMPARED_WIDTH = 23
_VERDICT_STYLES = {"better": "green", "worse": "red", "neutral": "dim"}


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the models side by side, each with its change from the first.

    Models that do not fit beside each other go into further tables, each with the baseline.

    Args:
        comparison: What to print.
        console: Where to print; None for stdout, coloured only on a terminal.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    compared = comparison.columns[1:]
    per_table = max(1, (console.width - _LABEL_AND_BASELINE_WIDTH) // _COMPARED_WIDTH)
    console.print(Text(comparison.title, style="bold"))
    for start in range(0, max(1, len(compared)), per_table):
        console.print(_table(comparison, compared[start : start + per_table]))


def _table(comparison: Comparison, compared: tuple[Column, ...]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metrics, baseline = comparison.rows(), comparison.columns[0]
    labels = [
        Text(f"{metric.label} ({metric.unit})" if metric.unit else metric.label)
        for metric in metrics
    ]
    columns = [_cells(column, baseline, metrics) for column in compared]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column()
    for column in (baseline, *compared):
        table.add_column(Text(column.name), justify="right", overflow="fold")
    for row in zip(labels, _values(baseline, metrics), *columns, strict=True):
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


def _cells(column: Column, baseline: Column, metrics: tuple[Metric, ...]) -> list[Text]:
    """Values and their changes in one column, so that its name stands above both."""
    from rich.text import Text

    changes = []
    for metric in metrics:
        difference = change(column.metrics.get(metric.key), baseline.metrics.get(metric.key), metric)
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
