"""How a Megatron-Core parameter is cut over tensor-parallel processes.

A ``Layout`` knows the two directions for one kind of parameter: ``merge`` cuts this
tensor-parallel process's shard out of whole Hugging Face tensors, ``split`` turns the shards
of all processes back into whole Hugging Face tensors. Both act on dimension 0 (output
channels) or the last (input channels) and leave the others alone, so quantization scales
travel by the same rules as the weights that they belong to.

Megatron-Core interleaves queries, keys and values by query group, and keeps the gate and the
up projection of one process next to each other, and so the parts of a Mamba layer's projection:
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/attention.py
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/ssm/mamba_mixer.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "Column",
    "Gated",
    "Layout",
    "Packed",
    "QueryKeyValue",
    "Row",
    "Vocabulary",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a parameter is cut over tensor-parallel processes; this one is not cut at all."""

    @property
    def dim(self) -> int | None:
        """The dimension that is cut: 0, -1, or None."""
        return None

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        """Returns the shard ``tp_rank`` of the parameter made of whole ``tensors``."""
        return tensors[0]

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the whole tensors that the shards of all processes make up."""
        return [shards[0]]


@dataclass(frozen=True, slots=True)
class OutputCut(Layout):
    """Cut along dimension 0 (output channels)."""

    @property
    def dim(self) -> int | None:
        return 0


@dataclass(frozen=True, slots=True)
class Column(OutputCut):
    """One tensor, cut along dimension 0."""

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return tensors[0].chunk(tp_size, 0)[tp_rank]

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), 0)]


@dataclass(frozen=True, slots=True)
class Row(Layout):
    """Cut along the last dimension (input channels)."""

    @property
    def dim(self) -> int | None:
        return -1

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return tensors[0].chunk(tp_size, -1)[tp_rank]

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), -1)]


@dataclass(frozen=True, slots=True)
class Vocabulary(OutputCut):
    """Cut along dimension 0 after padding with zeros to a multiple of the processes."""

    vocab_size: int

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        rows = -(-self.vocab_size // tp_size)
        shard = tensors[0][rows * tp_rank : rows * (tp_rank + 1)]
        padding = rows - shard.shape[0]
        return torch.cat([shard, shard.new_zeros(padding, *shard.shape[1:])]) if padding else shard

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), 0)[: self.vocab_size]]


@dataclass(frozen=True, slots=True)
class Gated(OutputCut):
    """Gate over up projection; each process holds its part of both."""

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return torch.cat([tensor.chunk(tp_size, 0)[tp_rank] for tensor in tensors], 0)

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        halves = [shard.chunk(2, 0) for shard in shards]
        return [torch.cat([half[i] for half in halves], 0) for i in range(2)]


@dataclass(frozen=True, slots=True)
class QueryKeyValue(OutputCut):
    """For each query group: its query heads, then its key head, then its value head."""

    num_query_groups: int
    queries_per_group: int
    head_dim: int

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        rest = tensors[0].shape[1:]
        grouped = torch.cat(
            [tensor.reshape(self.num_query_groups, -1, *rest) for tensor in tensors], 1
        )
        return grouped.chunk(tp_size, 0)[tp_rank].reshape(-1, *rest)

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        whole = torch.cat(list(shards), 0)
        rest = whole.shape[1:]
        sizes = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        grouped = whole.reshape(self.num_query_groups, sum(sizes), *rest)
        return [part.reshape(-1, *rest) for part in torch.split(grouped, sizes, 1)]


@dataclass(frozen=True, slots=True)
class Packed(OutputCut):
    """One tensor of several parts along dimension 0; each process holds its share of each."""

    sizes: tuple[int, ...]
    """Channels of the parts in the whole model."""

    def merge(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        parts = torch.split(tensors[0], list(self.sizes), 0)
        return torch.cat([part.chunk(tp_size, 0)[tp_rank] for part in parts], 0)

    def split(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [size // len(shards) for size in self.sizes]
        parts = zip(*(torch.split(shard, sizes, 0) for shard in shards), strict=True)
        return [torch.cat([piece for part in parts for piece in part], 0)]
