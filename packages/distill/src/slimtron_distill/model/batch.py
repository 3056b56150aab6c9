"""This process's part of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cut_over_context"]


def cut_over_context(tensor: Tensor, rank: int, size: int) -> Tensor:
    """Takes a context-parallel process's tokens of every sequence.

    Of ``2 * size`` equal pieces each process has one from the front and its mirror image from the
    back, so that causal attention is as much work for all: Megatron's attention expects it.

    Args:
        tensor: ``[b, s]``; ``2 * size`` divides ``s``.
        rank: The process's place in context parallelism.
        size: Processes in it.

    Returns:
        ``[b, s / size]``.
    """
    if size == 1:
        return tensor
    pieces = tensor.chunk(2 * size, 1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], 1)
