"""A weight that tensor-parallel processes share, and the exchanges between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Shard", "all_reduce"]


@dataclass(frozen=True, slots=True)
class Shard:
    """How a weight ``[out, in]`` is cut over processes; whole without a group."""

    dim: int = 0
    """0: each process holds output channels (column-parallel); 1: input channels (row-parallel)."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Processes that share the weight."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def part(self, length: int) -> slice:
        """Returns this process's part of ``length`` items; of input channels, those it holds."""
        rank = 0 if self.group is None else dist.get_rank(self.group)
        return slice(length * rank // self.size, length * (rank + 1) // self.size)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Returns every process's ``tensor``, all of one shape, joined along ``dim``."""
        if self.group is None:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.cat(parts, dim)


def all_reduce(
    tensor: Tensor,
    group: dist.ProcessGroup | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> Tensor:
    """Reduces ``tensor`` in place over ``group``, nothing where it is None; returns it."""
    if group is not None:
        dist.all_reduce(tensor, op, group)
    return tensor
