from __future__ import annotations

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.evaluation.config import EvaluationConfig


@pytest.mark.parametrize("name", ["num_tokens", "seq_length", "micro_batch_size"])
@pytest.mark.parametrize("value", [0, -512])
def test_counts_are_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        EvaluationConfig(**{name: value})
    assert (caught.value.where, caught.value.found) == (name, value)


def test_a_single_token_predicts_nothing() -> None:
    with pytest.raises(ConfigError, match="to predict"):
        EvaluationConfig(num_tokens=1, seq_length=1)
    EvaluationConfig(num_tokens=2, seq_length=2)


@pytest.mark.parametrize(("tokens", "next_multiple"), [(1000, 1024), (100, 512)])
def test_sequences_are_whole(tokens: int, next_multiple: int) -> None:
    with pytest.raises(ConfigError, match="whole sequences") as caught:
        EvaluationConfig(num_tokens=tokens, seq_length=512)
    assert str(caught.value.allowed).endswith(str(next_multiple))
    EvaluationConfig(num_tokens=next_multiple, seq_length=512)
