"""What a context-parallel process sees of a sequence."""

from __future__ import annotations

import torch

from slimtron_common.parallel.context_parallel import cut_over_context


def test_each_process_has_a_piece_of_the_front_and_one_of_the_back() -> None:
    tokens = torch.arange(16).view(2, 8)
    assert cut_over_context(tokens, 0, 1) is tokens
    parts = [cut_over_context(tokens, rank, 2) for rank in range(2)]
    assert parts[0][0].tolist() == [0, 1, 6, 7]
    assert parts[1][0].tolist() == [2, 3, 4, 5]
    assert torch.equal(torch.cat(parts, 1).sort(1).values, tokens)
