from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from slimtron_common.report import Plot
from slimtron_common.report.plots import NUM_COLORS, num_hidden_values, render_svg


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.text]


def test_same_plot_same_bytes(comparison: object) -> None:
    plot = Plot("t", "line", (0, 1, 2), {"a": (1, 2, 3)}, x_label="layer")
    assert render_svg(plot, salt="a") == render_svg(plot, salt="a")
    ids = [set(re.findall(r'id="(.*?)"', render_svg(plot, salt=salt))) for salt in "ab"]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_takes_colours_and_size_from_the_page() -> None:
    series = {str(index): (index, index + 1) for index in range(NUM_COLORS + 1)}
    svg = render_svg(Plot("t", "line", (0, 1), series, y_label="dB"), salt="")
    assert {f"var(--series-{index})" for index in range(NUM_COLORS)} <= set(
        re.findall(r"var\(--series-\d\)", svg)
    )
    assert "var(--muted)" in svg
    assert "var(--grid)" in svg
    assert not re.search("#[0-9a-f]{6}", svg)
    assert "stroke-dasharray" in svg
    assert "font-family" not in svg
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & root.attrib.keys()


def test_fetches_nothing() -> None:
    svg = render_svg(Plot("t", "bar", ("a",), {"s": (1,)}), salt="")
    assert re.findall(r'\S*="[^"]*//[^"]*"', svg) == [
        'xmlns:xlink="http://www.w3.org/1999/xlink"',
        'xmlns="http://www.w3.org/2000/svg"',
    ]


def test_labels_are_escaped_and_not_mathematics() -> None:
    evil = "</text><script>alert(1)</script>"
    svg = render_svg(
        Plot("t", "bar", (evil[:20], "$x_1$ #000101"), {"s": (1, 2)}, x_label=evil, y_label="$y$"),
        salt="",
    )
    assert "<script" not in svg
    assert {evil, evil[:20], "$x_1$ #000101", "$y$"} <= set(texts(svg))


def test_log_axes_are_labelled_in_plain_numbers() -> None:
    plot = Plot.histogram("t", {"a": [1e-3, 1e-2, 0.1, 1, 10, 11]}, log_x=True, log_y=True)
    labels = texts(render_svg(plot, salt=""))
    assert {"0.01", "0.1", "1", "10"} <= set(labels)
    assert not any("$" in label for label in labels)


def test_hundreds_of_layers_keep_a_few_readable_labels() -> None:
    names = tuple(f"decoder.layers.{i}.self_attention.linear_qkv" for i in range(400))
    svg = render_svg(Plot("t", "bar", names, {"s": tuple(range(400))}), salt="")
    labels = [text for text in texts(svg) if "…" in text]
    assert 10 <= len(labels) <= 24
    assert labels[0] == "decoder.lay….linear_qkv"


@pytest.mark.parametrize(
    ("plot", "hidden"),
    [
        (Plot("t", "line", (), {}), 0),
        (Plot("t", "line", (1, 2), {"a": (None, math.nan), "b": (math.inf, 1e308)}), 4),
        (Plot("t", "line", (1, 2, 3), {"a": (-1, 0, 1)}, log_y=True), 2),
        (Plot("t", "bar", ("a", "b", "c"), {"a": (-1, 0, 1)}, log_y=True), 1),
        (Plot("t", "bar", ("a", "b"), {"a": (-1, 0)}), 0),
        (Plot("t", "line", (0, 1, math.nan), {"a": (1, 2, 3)}, log_x=True), 2),
        (Plot("t", "line", ("early", "late"), {"a": (1, 2)}), 0),
        (Plot("t", "line", (1, 2), {"a": (-1, -2)}, log_y=True), 2),
        (Plot("t", "bar", (), {"a": ()}, log_y=True), 0),
        (Plot("t", "histogram", (1, 2, 4), {"a": (0, None)}), 1),
        (Plot("日本語", "bar", ("中文",), {"模型": (1,)}, x_label="層"), 0),
    ],
)
def test_counts_what_cannot_be_drawn(plot: Plot, hidden: int) -> None:
    assert num_hidden_values(plot) == hidden
    labels = texts(render_svg(plot, salt=""))
    num_values = sum(map(len, plot.series.values()))
    is_empty = hidden == num_values or plot.kind == "histogram"
    assert ("nothing to show" in labels) == is_empty
