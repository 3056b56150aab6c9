"""Attention under context parallelism on the CPU, where Megatron-Core has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class GatheringAttention(nn.Module):
    """Causal attention to the keys and values of all context-parallel processes."""

    def __init__(self, config: Any, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        from megatron.core import parallel_state
        from torch.distributed.nn.functional import all_gather

        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), dist.get_rank(group)
        length, batch, heads, width = query.shape
        positions = torch.arange(length * size).chunk(2 * size)
        held = [torch.cat([positions[r], positions[2 * size - 1 - r]]) for r in range(size)]
        # Its backward pass adds up what the processes want of each key.
        key, value = (
            torch.cat(list(all_gather(x.contiguous(), group=group)))
            .repeat_interleave(heads // x.shape[2], 2)
            .permute(1, 2, 0, 3)
            for x in (key, value)
        )
        mask = held[rank][:, None] >= torch.cat(held)[None, :]
        mixed = F.scaled_dot_product_attention(query.permute(1, 2, 0, 3), key, value, mask)
        return mixed.permute(2, 0, 1, 3).reshape(length, batch, heads * width)


@contextlib.contextmanager
def gathering_attention() -> Iterator[None]:
    """Builds models with it."""
    with (
        mock.patch("slimtron_common.models.megatron._use_transformer_engine", return_value=False),
        mock.patch("megatron.core.models.backends.DotProductAttention", GatheringAttention),
    ):
        yield
