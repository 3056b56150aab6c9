"""Megatron-Core's own attention under context parallelism, which it lacks itself.

Transformer Engine passes keys and values around a ring and is for GPUs. Here every process gathers
them whole: the arithmetic of one process, on any device, at the price of all keys and values of one
layer in memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from slimtron_common.parallel.context_parallel import join_over_context, local_positions

__all__ = ["ContextParallelAttention"]


class ContextParallelAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention of a process's tokens to those of all processes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self._window, self.scale_mask_softmax.window_size = (
            self.scale_mask_softmax.window_size,
            None,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attends.

        Args:
            query: ``[s/cp, b, heads/tp, d]``.
            key: ``[s/cp, b, groups/tp, d]``.
            value: As ``key``.
            attention_mask: None; the mask is causal.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            ``[s/cp, b, heads/tp * d]``.
        """
        assert attention_mask is None, "the mask is causal"
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), dist.get_rank(group)
        positions = local_positions(query.shape[0] * size, rank, size).to(query.device)
        distance = positions[:, None] - torch.arange(len(positions) * size, device=query.device)
        masked = distance < 0
        if self._window is not None:
            masked |= distance > self._window[0]
        output: Tensor = super().forward(
            query,
            join_over_context(key, group),
            join_over_context(value, group),
            masked[None, None],
            *args,
            **kwargs,
        )
        return output
