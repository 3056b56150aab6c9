from __future__ import annotations

import pytest
from packages.distill.tests.kd_vocab_parallel import check_vocab_parallel

from slimtron_common.testing import ranks, run_ranks


@pytest.mark.parametrize("world_size", [2, 4])
def test_kernels_of_processes_that_share_a_gpu(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that has imported Megatron holds a CUDA context, which its forks cannot use.
    monkeypatch.setattr(ranks, "PRELOADED", [])
    run_ranks(check_vocab_parallel, world_size, "cuda")
