from __future__ import annotations

import pytest
from packages.distill.tests.kd_vocab_parallel import check_vocab_parallel

from slimtron_common.testing import run_ranks


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_over_a_cut_vocabulary(world_size: int) -> None:
    run_ranks(check_vocab_parallel, world_size, "cpu")
