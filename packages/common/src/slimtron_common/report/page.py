"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from itertools import starmap

from slimtron_common.__about__ import __version__
from slimtron_common.report.comparison import Comparison, Metric, Number, Plot, Table
from slimtron_common.report.formatting import (
    Change,
    change,
    format_cell,
    format_value,
    is_broken,
)
from slimtron_common.report.plots import NUM_COLORS, num_hidden_values, render_svg

__all__ = ["render_page"]

_MAX_OPEN_ROWS = 12
_BETTER = {
    "lower": ("↓", "lower is better"),
    "higher": ("↑", "higher is better"),
    None: ("", ""),
}


def render_page(comparison: Comparison) -> str:
    """Renders a report.

    Args:
        comparison: What the page shows.

    Returns:
        A complete HTML document: the same text for the same comparison and the same versions of
        Slimtron and matplotlib. Everything that comes from the comparison is escaped.
    """
    title = escape(comparison.title)
    style = files("slimtron_common.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = (
        _header(comparison),
        _cards(comparison),
        _section("Before and after", _comparison_table(comparison)),
        _section("Plots", *starmap(_figure, enumerate(comparison.plots)), style="plots"),
        _section("Details", *map(_table, comparison.tables)),
        _section("Facts", _facts(comparison.facts)),
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{_lines(sections)}
<footer>Slimtron {escape(__version__)}. The same numbers, for programs: report.json.</footer>
</main>
</body>
</html>
"""


def _header(comparison: Comparison) -> str:
    models = '<span class="arrow">→</span>'.join(
        f"<span>{escape(column.name)}</span>" for column in comparison.columns
    )
    return (
        f'<header><p class="brand">Slimtron report</p><h1>{escape(comparison.title)}</h1>'
        f'<p class="models">{models}</p></header>'
    )


def _section(title: str, *parts: str, style: str = "") -> str:
    if not any(parts):
        return ""
    return f'<section><h2>{title}</h2>\n<div class="{style}">{_lines(parts)}</div></section>'


def _cards(comparison: Comparison) -> str:
    """The headline numbers of the last model."""
    first, last = comparison.columns[0], comparison.columns[-1]
    cards = [
        _card(metric, last.metrics[metric.key], first.metrics.get(metric.key))
        for metric in comparison.rows()
        if metric.headline and last.metrics.get(metric.key) is not None
    ]
    return f'<div class="cards">{_lines(cards)}</div>' if cards else ""


def _card(metric: Metric, value: Number, baseline: Number) -> str:
    difference = change(value, baseline, metric)
    if difference:
        note = f"<span>was {escape(format_value(baseline, metric))}</span>{_change(difference)}"
    else:
        note = _BETTER[metric.better][1]
    return (
        f'<div class="card"><h3>{_label(metric)}</h3>'
        f'<p class="value">{_value(value, metric)}</p>'
        f'<p class="hint">{note}</p>{_bars(value, baseline, metric)}</div>'
    )


def _bars(value: Number, baseline: Number, metric: Metric) -> str:
    """Bars to scale, before above after; a fraction also stands alone, on its whole."""
    is_fraction = metric.format == "fraction"
    bars = {"was": baseline, "is": value}
    if is_fraction and baseline is None:
        del bars["was"]
    lengths = [length for length in bars.values() if length is not None and length >= 0]
    whole = 1.0 if is_fraction else max(lengths, default=0.0)
    if len(lengths) < len(bars) or not math.isfinite(whole) or not (baseline or is_fraction):
        return ""
    items = "".join(
        f'<div><i class="{name}" style="width:{100 * length / whole:.2f}%"></i></div>'
        for name, length in zip(bars, lengths, strict=True)
    )
    return f'<div class="bars" aria-hidden="true">{items}</div>'


def _comparison_table(comparison: Comparison) -> str:
    first, *others = comparison.columns
    head = "".join(
        f'<th scope="col"{span}>{escape(column.name)}</th>'
        for column, span in ((first, ""), *((other, ' colspan="2"') for other in others))
    )
    rows = []
    for metric in comparison.rows():
        before = first.metrics.get(metric.key)
        arrow, hint = _BETTER[metric.better]
        cells = [
            f'<th scope="row">{_label(metric)} '
            f'<span class="hint" title="{hint}">{arrow}</span></th>',
            f"<td>{_value(before, metric)}</td>",
        ]
        for column in others:
            after = column.metrics.get(metric.key)
            difference = change(after, before, metric)
            cells.append(f"<td>{_value(after, metric)}</td>")
            cells.append(f'<td class="change">{_change(difference) if difference else ""}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="comparison"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>{_lines(rows)}</tbody></table></div>"
        '<p class="hint">↓ lower is better, ↑ higher is better; changes are relative '
        f"to {escape(first.name)}.</p>"
    )


def _figure(index: int, plot: Plot) -> str:
    notes = [plot.note] if plot.note else []
    if hidden := num_hidden_values(plot):
        notes.append(f"{hidden} values are missing or cannot be drawn on this axis.")
    legend = "".join(
        f'<li><i class="{"solid" if number < NUM_COLORS else "dashed"}" '
        f'style="border-color:var(--series-{number % NUM_COLORS})"></i>{escape(name)}</li>'
        for number, name in enumerate(plot.series)
    )
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>"
        f'<ul class="legend">{legend}</ul>'
        f'<div role="img" aria-label="{escape(plot.title)}">'
        f"{render_svg(plot, salt=f'slimtron-{index}')}</div>"
        f"{''.join(f'<p>{escape(note)}</p>' for note in notes)}</figure>"
    )


def _table(table: Table) -> str:
    numeric = [
        any(isinstance(row[index], int | float) for row in table.rows)
        for index in range(len(table.header))
    ]
    head = "".join(
        f'<th scope="col"{_number_class(right)}>{escape(name)}</th>'
        for name, right in zip(table.header, numeric, strict=True)
    )
    rows = (
        "".join(
            f"<td{_number_class(right)}>{escape(format_cell(cell))}</td>"
            for cell, right in zip(row, numeric, strict=True)
        )
        for row in table.rows
    )
    is_open = " open" if len(table.rows) <= _MAX_OPEN_ROWS else ""
    return (
        f"<details{is_open}><summary>{escape(table.title)}"
        f'<span class="hint">{len(table.rows)} rows</span></summary>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{_lines(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div></details>"
    )


def _facts(facts: dict[str, str]) -> str:
    if not facts:
        return ""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<dl>{_lines(items)}</dl>"


def _value(value: Number, metric: Metric) -> str:
    text = escape(format_value(value, metric))
    if value is None:
        return f'<span class="absent">{text}</span>'
    exact = f' title="{escape(repr(value))}"'
    return f'<span class="{"broken" if is_broken(value) else "number"}"{exact}>{text}</span>'


def _label(metric: Metric) -> str:
    unit = f' <span class="unit">({escape(metric.unit)})</span>' if metric.unit else ""
    return escape(metric.label) + unit


def _change(difference: Change) -> str:
    text = escape(difference.text.replace("-", "−"))  # noqa: RUF001 - a minus sign is meant
    return f'<span class="chip {difference.verdict}">{text}</span>'


def _number_class(right: bool) -> str:
    return ' class="number"' if right else ""


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(filter(None, parts))
