"""What a context-parallel process sees of a sequence."""

from __future__ import annotations

import pytest
import torch

from slimtron_common.errors import ParallelismError
from slimtron_common.parallel.context_parallel import (
    check_sequence_cut,
    cut_over_context,
    local_positions,
)


def test_each_process_has_a_piece_of_the_front_and_one_of_the_back() -> None:
    tokens = torch.arange(16).view(2, 8)
    assert cut_over_context(tokens, 0, 1) is tokens
    parts = [cut_over_context(tokens, rank, 2) for rank in range(2)]
    assert parts[0][0].tolist() == [0, 1, 6, 7]
    assert parts[1][0].tolist() == [2, 3, 4, 5]
    assert torch.equal(torch.cat(parts, 1).sort(1).values, tokens)


def test_positions_are_those_of_the_tokens() -> None:
    assert local_positions(5, 0, 1).tolist() == [0, 1, 2, 3, 4]
    assert local_positions(12, 1, 3).tolist() == [2, 3, 8, 9]


def test_lengths_that_cannot_be_cut() -> None:
    check_sequence_cut(7, 1, where="seq_length")
    check_sequence_cut(12, 3, where="seq_length")
    with pytest.raises(ParallelismError, match="such as 12"):
        check_sequence_cut(10, 3, where="seq_length")
