"""Processes, groups and Megatron's schedules."""

from slimtron_common.parallel.config import ParallelConfig
from slimtron_common.parallel.context import ParallelContext, initialize_parallel
from slimtron_common.parallel.schedule import forward_only
from slimtron_common.parallel.unwrap import unwrap_chunks, unwrap_model

__all__ = [
    "ParallelConfig",
    "ParallelContext",
    "forward_only",
    "initialize_parallel",
    "unwrap_chunks",
    "unwrap_model",
]
