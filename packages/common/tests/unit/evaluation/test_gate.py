from __future__ import annotations

from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.evaluation.gate import QualityGate

ORIGINAL = {"perplexity": 10.0}


@pytest.mark.parametrize("limit", [0.05, "5%", "0.05", " 5 %".replace(" %", "%")])
def test_shares_are_numbers_or_per_cent(limit: Any) -> None:
    assert QualityGate(max_perplexity_increase=limit).max_perplexity_increase == 0.05


def test_without_limits_everything_passes() -> None:
    assert QualityGate().misses(ORIGINAL, {"perplexity": float("nan"), "agreement": None}) == []


@pytest.mark.parametrize(
    ("perplexity", "agreement", "missed"),
    [
        (10.5, 0.9, []),
        (9.0, 1.0, []),
        (10.51, 0.9, ["perplexity rose by 5.10%, allowed are 5.00%"]),
        (10.0, 0.895, ["89.50% of the tokens agree, wanted are 90.00%"]),
    ],
)
def test_a_limit_itself_passes(perplexity: float, agreement: float, missed: list[str]) -> None:
    gate = QualityGate(max_perplexity_increase="5%", min_agreement="90%")
    assert gate.misses(ORIGINAL, {"perplexity": perplexity, "agreement": agreement}) == missed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_no_number_misses(value: float | None) -> None:
    gate = QualityGate(max_perplexity_increase=10.0, min_agreement=0.0)
    assert len(gate.misses(ORIGINAL, {"perplexity": value, "agreement": 1.0})) == 1
    assert len(gate.misses(ORIGINAL, {"perplexity": 10.0, "agreement": None})) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_perplexity_increase", "-1%"),
        ("max_perplexity_increase", "five"),
        ("max_perplexity_increase", "inf"),
        ("max_perplexity_increase", True),
        ("min_agreement", 1.1),
        ("min_agreement", "101%"),
        ("min_agreement", "nan"),
        ("min_agreement", "%"),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        QualityGate(**{field: value})
    assert error.value.where == field


def test_verdict_of_a_report() -> None:
    original, delivered = {"perplexity": 10.0}, {"perplexity": 12.0, "agreement": 0.8}
    assert QualityGate().verdict(original, delivered) is None
    assert QualityGate(min_agreement=0.8).verdict(original, delivered) == "passed"
    gate = QualityGate(max_perplexity_increase="10%")
    assert str(gate.verdict(original, delivered)).startswith("missed: perplexity rose by 20.00%")
