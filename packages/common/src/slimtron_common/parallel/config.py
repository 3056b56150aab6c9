"""How a model is laid out over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from slimtron_common.errors import ConfigError

__all__ = ["ParallelConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of Megatron's parallel axes; data parallelism takes the processes that remain."""

    tensor_parallel_size: int = 1
    """Processes that share every weight matrix."""

    pipeline_parallel_size: int = 1
    """Pipeline stages that share the layers."""

    context_parallel_size: int = 1
    """Processes that share every sequence."""

    expert_parallel_size: int = 1
    """Processes that share the experts of a mixture-of-experts layer."""

    sequence_parallel: bool = False
    """Whether norms and dropouts work on the sequence cut over the tensor-parallel processes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "sequence_parallel" and value < 1:
                raise ConfigError(
                    "a parallel size counts processes",
                    where=field.name,
                    found=value,
                    allowed="1 or more",
                )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError(
                "sequence parallelism cuts the sequence over the tensor-parallel processes",
                where="sequence_parallel",
                found="true with tensor_parallel_size 1",
                hint="set tensor_parallel_size to 2 or more, or leave sequence_parallel off",
            )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def min_world_size(self) -> int:
        """The fewest processes: those that share experts out may be data-parallel ones."""
        shared = math.lcm(self.context_parallel_size, self.expert_parallel_size)
        return self.model_parallel_size // self.context_parallel_size * shared

    def describe(self, world_size: int) -> str:
        """The layout of ``world_size`` processes, for reports."""
        parts = [f"tensor {self.tensor_parallel_size}", f"pipeline {self.pipeline_parallel_size}"]
        if self.context_parallel_size > 1:
            parts.append(f"context {self.context_parallel_size}")
        if self.expert_parallel_size > 1:
            parts.append(f"expert {self.expert_parallel_size}")
        return ", ".join([*parts, f"{world_size} process(es)"])
