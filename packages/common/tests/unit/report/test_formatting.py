from __future__ import annotations

import math

import pytest

from slimtron_common.report import Metric
from slimtron_common.report.comparison import Cell, Number
from slimtron_common.report.formatting import change, format_cell, format_value

NUMBER = Metric("n", "N", better="lower")
BYTES = Metric("b", "B", better="lower", format="bytes")
FRACTION = Metric("f", "F", better="higher", format="fraction")
COUNT = Metric("c", "C", format="count")


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (None, NUMBER, "n/a"),
        (math.nan, BYTES, "nan"),
        (math.inf, FRACTION, "inf"),
        (-math.inf, COUNT, "-inf"),
        (14.004123, NUMBER, "14.004"),
        (4.5, NUMBER, "4.500"),
        (16.0, NUMBER, "16"),
        (0, NUMBER, "0"),
        (0.08231, NUMBER, "0.08231"),
        (1.234e-7, NUMBER, "1.234e-07"),
        (709494.96, NUMBER, "709,495.0"),
        (1.5e12, NUMBER, "1.5e+12"),
        (-3.25, NUMBER, "-3.250"),
        (512, BYTES, "512 B"),
        (269030016, BYTES, "256.6 MiB"),
        (3 * 2**40, BYTES, "3.00 TiB"),
        (134515008, COUNT, "134,515,008"),
        (0.97314, FRACTION, "97.31%"),
        (1, FRACTION, "100.00%"),
        (0.999999, FRACTION, "99.9999%"),
        (1e-6, FRACTION, "0.0001%"),
    ],
)
def test_format_value(value: Number, metric: Metric, text: str) -> None:
    assert format_value(value, metric) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (4.5, "4.500"),
        (math.nan, "nan"),
        ("1e3", "1e3"),
    ],
)
def test_format_cell(value: Cell, text: str) -> None:
    assert format_cell(value) == text


@pytest.mark.parametrize(
    ("value", "baseline", "metric", "text", "verdict"),
    [
        (50, 100, NUMBER, "-50.0%", "better"),
        (101.5, 100, NUMBER, "+1.50%", "worse"),
        (100.001, 100, NUMBER, "+0.001%", "worse"),
        (250, 100, NUMBER, "2.5x", "worse"),
        (5_000_000, 100, NUMBER, "50,000x", "worse"),
        (3, 100, NUMBER, "0.03x", "better"),
        (0, 100, NUMBER, "-100.0%", "better"),
        (100, 100, NUMBER, "=", "neutral"),
        (0, 0, NUMBER, "=", "neutral"),
        (0.88, 1.0, FRACTION, "-12.0 pp", "worse"),
        (0.99, 0.98, FRACTION, "+1.00 pp", "better"),
        (2, 4, COUNT, "-50.0%", "neutral"),
    ],
)
def test_change(value: Number, baseline: Number, metric: Metric, text: str, verdict: str) -> None:
    difference = change(value, baseline, metric)
    assert difference is not None
    assert (difference.text, difference.verdict) == (text, verdict)


@pytest.mark.parametrize(
    ("value", "baseline"), [(None, 1), (1, None), (math.nan, 1), (1, math.inf), (1, 0), (1, -1)]
)
def test_no_change_without_a_meaning(value: Number, baseline: Number) -> None:
    assert change(value, baseline, NUMBER) is None
