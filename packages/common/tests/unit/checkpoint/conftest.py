from __future__ import annotations

from collections.abc import Iterator

import pytest

from slimtron_common.parallel import ParallelContext, initialize_parallel


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context
