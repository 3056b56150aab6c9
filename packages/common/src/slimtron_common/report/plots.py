"""Plots as SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import TYPE_CHECKING

from slimtron_common.report.comparison import Number, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NUM_COLORS", "num_hidden_values", "render_svg"]

NUM_COLORS = 8
"""The page defines ``--series-0`` to ``--series-7``; further series are dashed."""

# Matplotlib wants real colours. These stand for the page's own, so that one picture serves the
# light and the dark page.
_TEXT, _GRID = "#000101", "#000102"
_SERIES = tuple(f"#0002{index:02x}" for index in range(NUM_COLORS))
_VARIABLES = {
    _TEXT: "var(--muted)",
    _GRID: "var(--grid)",
    **{color: f"var(--series-{index})" for index, color in enumerate(_SERIES)},
}

_SIZE_INCHES = (5.8, 2.7)
_MAX_LABELS = 24
_MAX_LABEL_LENGTH = 24
_MAX_AXIS_LABEL_LENGTH = 48
_MAX_UPRIGHT_CHARACTERS = 72
_MAX_MARKED_POINTS = 40
# Beyond these, matplotlib's own arithmetic on the axis limits overflows.
_MAX_MAGNITUDE = 1e300


def render_svg(plot: Plot, *, salt: str) -> str:
    """Draws a plot.

    Args:
        plot: What to draw. Title, legend and note are left to the page.
        salt: Makes the element ids of several pictures on one page differ.

    Returns:
        An ``<svg>`` element with a transparent background, the same text for the same input. Its
        colours are the page's ``--muted``, ``--grid`` and ``--series-N``.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _TEXT,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    picture = io.BytesIO()
    with rc_context(settings), warnings.catch_warnings():
        # The browser draws the text: what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        _draw(figure.add_subplot(), plot)
        FigureCanvasSVG(figure).print_svg(picture, metadata={"Date": None})
    return _fit_into_page(picture.getvalue().decode())


def num_hidden_values(plot: Plot) -> int:
    """How many values the picture cannot show: missing, not finite, or off a logarithmic axis.

    Bars of 0 are no such values: on any axis they have no height.
    """
    return sum(math.isnan(value) for values in _drawable(plot) for value in values)


def _drawable(plot: Plot) -> list[list[float]]:
    """The series, with NaN for what cannot be drawn."""
    is_line = plot.kind == "line"

    def is_drawable(x: float | str, value: Number) -> bool:
        if value is None or not abs(value) < _MAX_MAGNITUDE:
            return False
        if plot.log_y and (value <= 0 if is_line else value < 0):
            return False
        if isinstance(x, str) or not is_line:
            return True
        return abs(x) < _MAX_MAGNITUDE and (x > 0 or not plot.log_x)

    return [
        [
            float(value) if value is not None and is_drawable(x, value) else math.nan
            for x, value in zip(plot.x, values, strict=False)  # a histogram has one more edge
        ]
        for values in plot.series.values()
    ]


def _draw(axes: Axes, plot: Plot) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel(_shorten(plot.x_label, _MAX_AXIS_LABEL_LENGTH))
    axes.set_ylabel(_shorten(plot.y_label, _MAX_AXIS_LABEL_LENGTH))

    series = _drawable(plot)
    values = [value for numbers in series for value in numbers if not math.isnan(value)]
    if not (any(values) if plot.kind == "histogram" else values):
        axes.set(xticks=(), yticks=())
        axes.text(0.5, 0.5, "nothing to show", ha="center", color=_TEXT, transform=axes.transAxes)
        return
    if plot.log_y and any(value > 0 for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    if plot.log_x and plot.kind != "bar":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    elif all(isinstance(x, int) for x in plot.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    if plot.kind == "histogram":
        _draw_histogram(axes, plot, series)
    elif plot.kind == "line":
        _draw_lines(axes, plot, series)
    else:
        _draw_bars(axes, plot, series)
    if plot.kind == "bar" or any(isinstance(x, str) for x in plot.x):
        _name_categories(axes, [str(x) for x in plot.x])


def _draw_lines(axes: Axes, plot: Plot, series: list[list[float]]) -> None:
    positions = range(len(plot.x)) if any(isinstance(x, str) for x in plot.x) else plot.x
    for index, values in enumerate(series):
        axes.plot(
            positions,
            values,
            color=_SERIES[index % NUM_COLORS],
            linestyle="-" if index < NUM_COLORS else "--",
            linewidth=1.5,
            marker="o",
            markersize=3 if len(values) <= _MAX_MARKED_POINTS else 1.2,
        )


def _draw_bars(axes: Axes, plot: Plot, series: list[list[float]]) -> None:
    width = 0.8 / max(1, len(series))
    for index, values in enumerate(series):
        offset = (index + 0.5) * width - 0.4
        axes.bar(
            [position + offset for position in range(len(values))],
            values,
            width * 0.92,
            color=_SERIES[index % NUM_COLORS],
        )


def _draw_histogram(axes: Axes, plot: Plot, series: list[list[float]]) -> None:
    for index, values in enumerate(series):
        color = _SERIES[index % NUM_COLORS]
        axes.stairs(values, plot.x, fill=True, color=color, alpha=0.12)
        axes.stairs(values, plot.x, color=color, linewidth=1.3)


def _name_categories(axes: Axes, names: list[str]) -> None:
    step = math.ceil(len(names) / _MAX_LABELS) or 1
    labels = [_shorten(name, _MAX_LABEL_LENGTH) for name in names[::step]]
    axes.set_xticks(range(0, len(names), step), labels)
    if sum(map(len, labels)) > _MAX_UPRIGHT_CHARACTERS:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def _shorten(name: str, length: int) -> str:
    """Cuts the middle out: module names differ at both ends."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def _fit_into_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r' (?:width|height)="[\d.]+pt"|font-family: [^;"]*; ', "", tag[0])
        text = re.sub(r' id="([^"]*)"', lambda id_: id_[0] if id_[1] in referenced else "", text)
        return re.sub("#[0-9a-f]{6}", lambda color: _VARIABLES.get(color[0], color[0]), text)

    # Only inside tags: the labels between them are the user's own text.
    return re.sub("<[^>]+>", adapt, svg)
