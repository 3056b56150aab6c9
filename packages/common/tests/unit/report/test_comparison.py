from __future__ import annotations

import math

import numpy as np
import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.report import Column, Comparison, Metric, Plot, Table


def test_rows_are_in_the_standard_order_and_unknown_metrics_come_last() -> None:
    rows = Comparison(
        "t",
        (Column("a", {"agreement": 1.0, "zeta": 1}), Column("b", {"weight_bytes": 1, "beta": 2})),
        metrics=(Metric("beta", "Beta", better="higher"), Metric("agreement", "Same token")),
    ).rows()
    assert [row.key for row in rows] == ["weight_bytes", "agreement", "beta", "zeta"]
    assert [row.label for row in rows] == ["Weights", "Same token", "Beta", "zeta"]


@pytest.mark.parametrize("columns", [(), (Column("a", {}), Column("a", {}))])
def test_columns_need_different_names(columns: tuple[Column, ...]) -> None:
    with pytest.raises(ConfigError, match="different names"):
        Comparison("t", columns)


def test_series_must_fit_the_axis() -> None:
    with pytest.raises(ConfigError, match="series 'a' does not fit"):
        Plot("t", "line", (1, 2), {"a": (1, 2, 3)})
    with pytest.raises(ConfigError, match="series 'a' does not fit"):
        Plot("t", "histogram", (1, 2), {"a": (1, 2)})


@pytest.mark.parametrize("edges", [(), (1,), (1, 1), (2, 1), ("a", "b"), (0, math.nan)])
def test_edges_of_a_histogram_must_increase(edges: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="increasing"):
        Plot("t", "histogram", edges, {})
    with pytest.raises(ConfigError, match="positive"):
        Plot("t", "histogram", (0, 1), {"a": (1,)}, log_x=True)


def test_rows_must_fit_the_header() -> None:
    with pytest.raises(ConfigError, match="row 1 does not fit"):
        Table("t", ("a", "b"), ((1, 2), (1,)))


@pytest.mark.parametrize("log_x", [False, True])
def test_histogram_counts_every_value_once(log_x: bool) -> None:
    generator = np.random.default_rng(0)
    samples = {name: np.exp(generator.normal(size=500)).tolist() for name in ("a", "b")}
    plot = Plot.histogram("t", samples, num_bins=20, log_x=log_x)
    assert len(plot.x) == 21
    assert plot.x[0] == min(map(min, samples.values()))
    assert plot.x[-1] == max(map(max, samples.values()))
    for name, values in samples.items():
        expected, _ = np.histogram(values, bins=np.array(plot.x))
        assert plot.series[name] == tuple(expected)
        assert sum(expected) == 500
    assert plot.note == ""


def test_histogram_tells_what_it_cannot_show() -> None:
    values = [math.nan, math.inf, 0.0, -1.0, 2.0, 3.0]
    plot = Plot.histogram("t", {"a": values}, num_bins=2)
    assert plot.series["a"] == (2, 2)
    assert plot.note == "2 of 6 values are not finite and not shown."
    plot = Plot.histogram("t", {"a": values}, num_bins=2, log_x=True)
    assert plot.series["a"] == (1, 1)
    assert plot.note == "4 of 6 values are zero, negative or not finite and not shown."


@pytest.mark.parametrize("values", [[], [0.25] * 3, [math.nan]])
@pytest.mark.parametrize("log_x", [False, True])
def test_histogram_of_no_range(values: list[float], log_x: bool) -> None:
    plot = Plot.histogram("t", {"a": values}, log_x=log_x)
    counts = [count or 0 for count in plot.series["a"]]
    assert sum(counts) == sum(map(math.isfinite, values))
