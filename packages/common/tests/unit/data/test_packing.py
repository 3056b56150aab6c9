from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from slimtron_common.data import pack
from slimtron_common.errors import ConfigError

SEPARATOR = 0


def test_separators_stand_between_documents_only() -> None:
    packed = pack(
        [[1, 2, 3], [4], [5, 6, 7]], seq_length=3, num_sequences=3, separator_id=SEPARATOR
    )
    np.testing.assert_array_equal(packed, [[1, 2, 3], [0, 4, 0], [5, 6, 7]])
    assert packed.dtype == np.int64


def test_without_a_separator_documents_touch() -> None:
    packed = pack([[1, 2, 3], [4]], seq_length=2, num_sequences=2, separator_id=None)
    np.testing.assert_array_equal(packed, [[1, 2], [3, 4]])


def test_empty_documents_leave_no_trace() -> None:
    packed = pack(
        [[], [1], [], [], [2, 3], []], seq_length=2, num_sequences=2, separator_id=SEPARATOR
    )
    np.testing.assert_array_equal(packed, [[1, 0], [2, 3]])


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_concatenation_cut_into_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [
        rng.integers(1, 99, size=size).tolist()
        for size in rng.integers(1, 30, size=rng.integers(1, 12))
    ]
    whole = np.concatenate([[SEPARATOR, *document] for document in documents])[1:]
    seq_length = int(rng.integers(1, whole.size + 1))
    num_sequences = whole.size // seq_length
    packed = pack(
        documents, seq_length=seq_length, num_sequences=num_sequences, separator_id=SEPARATOR
    )
    np.testing.assert_array_equal(packed.ravel(), whole[: packed.size])
    assert packed.shape == (num_sequences, seq_length)


def test_documents_are_read_only_as_far_as_needed() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 7

    packed = pack([endless()], seq_length=4, num_sequences=2, separator_id=SEPARATOR)
    np.testing.assert_array_equal(packed, np.full((2, 4), 7))


def test_too_few_tokens_are_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        pack([[1] * 6, [2] * 4], seq_length=4, num_sequences=3, separator_id=SEPARATOR)
    assert caught.value.found == "11 tokens"
    assert caught.value.hint is not None
    assert "ask for 8 tokens at most" in caught.value.hint


def test_too_few_tokens_for_one_sequence() -> None:
    with pytest.raises(ConfigError, match="found: 0 tokens"):
        pack([], seq_length=4, num_sequences=1, separator_id=SEPARATOR)
