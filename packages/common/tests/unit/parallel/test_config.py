from __future__ import annotations

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.parallel import ParallelConfig


def test_model_parallel_size_is_a_copy_of_the_model() -> None:
    config = ParallelConfig(
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        context_parallel_size=5,
        expert_parallel_size=7,
    )
    assert ParallelConfig().model_parallel_size == 1
    assert config.model_parallel_size == 2 * 3 * 5
    assert config.min_world_size == 2 * 3 * 5 * 7
    assert config.describe(210) == "tensor 2, pipeline 3, context 5, expert 7, 210 process(es)"


def test_experts_may_be_shared_out_over_data_parallel_processes() -> None:
    config = ParallelConfig(context_parallel_size=2, expert_parallel_size=4)
    assert (config.model_parallel_size, config.min_world_size) == (2, 4)


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context", "expert"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_count_processes(axis: str, size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**{f"{axis}_parallel_size": size})
    assert caught.value.where == f"{axis}_parallel_size"
    assert caught.value.found == size


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    assert ParallelConfig(tensor_parallel_size=2, sequence_parallel=True).sequence_parallel
    with pytest.raises(ConfigError, match="sequence parallelism") as caught:
        ParallelConfig(sequence_parallel=True)
    assert "tensor_parallel_size" in str(caught.value.hint)
