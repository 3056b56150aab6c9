from __future__ import annotations

from pathlib import Path

import pytest

from slimtron_common.errors import ConfigError
from slimtron_quant.mixed.config import MixedPrecisionConfig


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("80MB", 80_000_000),
        ("1.5GiB", 1_610_612_736),
        ("12 kb", 12_000),
        ("2TiB", 2 * 2**40),
        ("512B", 512),
    ],
)
def test_sizes(size: str, expected: int) -> None:
    assert MixedPrecisionConfig(size=size).num_bytes == expected


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"bits": 4.8, "size": "80MB"}, "bits"),
        ({"bits": 0.0}, "bits"),
        ({"bits": float("nan")}, "bits"),
        ({"size": "80"}, "size"),
        ({"size": "0MB"}, "size"),
        ({"size": "-1MB"}, "size"),
        ({"size": "80 pounds"}, "size"),
        ({"bits": 5.0, "candidates": ("fp8",)}, "candidates"),
        ({"bits": 5.0, "candidates": ("fp8", "fp8")}, "candidates"),
        ({"bits": 5.0, "candidates": ("fp8", "fp9")}, "candidates"),
        ({"bits": 5.0, "candidates": ("fp8", "mine.yaml")}, "candidates"),
        ({"bits": 5.0, "sensitivity_tokens": 0}, "sensitivity_tokens"),
        ({"sensitivity": Path("sensitivity.json")}, "sensitivity"),
    ],
)
def test_refusals(fields: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as error:
        MixedPrecisionConfig(**fields)  # type: ignore[arg-type]
    assert error.value.where == where


def test_nothing_is_asked_for_by_default() -> None:
    assert not MixedPrecisionConfig().is_on
    assert MixedPrecisionConfig(bits=4.8).is_on
    assert MixedPrecisionConfig(size="1GiB").is_on
