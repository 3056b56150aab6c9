from __future__ import annotations

import pytest

from slimtron_common.config import build_config, to_dict
from slimtron_common.data import DataConfig
from slimtron_common.errors import ConfigError


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences"), [(1, 1), (512, 1), (513, 2), (1024, 2), (4000, 8)]
)
def test_tokens_are_rounded_up_to_whole_sequences(num_tokens: int, num_sequences: int) -> None:
    assert DataConfig(source="pydoc", num_tokens=num_tokens).num_sequences == num_sequences


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_tokens", 0),
        ("seq_length", 1),
        ("micro_batch_size", 0),
        ("seed", -1),
        ("source", ""),
        ("text_field", ""),
    ],
)
def test_out_of_range_names_the_field(field: str, value: object) -> None:
    values: dict[str, object] = {"source": "pydoc", "num_tokens": 512, field: value}
    with pytest.raises(ConfigError) as caught:
        DataConfig(**values)  # type: ignore[arg-type]
    assert caught.value.where == field


def test_comes_from_flags_and_goes_back_to_a_dict() -> None:
    config = build_config(
        DataConfig, flags={"source": "a.jsonl"}, overrides=["num_tokens=100", "shuffle=false"]
    )
    assert to_dict(config) == {
        "source": "a.jsonl",
        "num_tokens": 100,
        "seq_length": 512,
        "micro_batch_size": 1,
        "seed": 1234,
        "shuffle": False,
        "text_field": "text",
    }
