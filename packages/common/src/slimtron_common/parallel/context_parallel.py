"""Sequences cut over context-parallel processes, and put together again.

Of ``2 * size`` equal pieces each process has one from the front and its mirror image from the back,
so that causal attention is as much work for all. Megatron-Core's rotary positions and Transformer
Engine's attention expect that.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from slimtron_common.errors import ParallelismError
from slimtron_common.parallel.collectives import copy_to_group, gather_from_group

__all__ = ["check_sequence_cut", "cut_over_context", "join_over_context", "local_positions"]


def check_sequence_cut(seq_length: int, size: int, *, where: str) -> None:
    """Refuses sequences that cannot be cut.

    Args:
        seq_length: Tokens in a sequence.
        size: Context-parallel processes.
        where: The setting that the length is from.

    Raises:
        ParallelismError: With a length that can be cut.
    """
    pieces = 2 * size
    if size > 1 and seq_length % pieces:
        raise ParallelismError(
            f"context parallelism over {size} processes cuts every sequence into {pieces} equal "
            "pieces",
            where=where,
            found=seq_length,
            allowed=f"a multiple of {pieces}, such as {-(-seq_length // pieces) * pieces}",
        )


def cut_over_context(tensor: Tensor, rank: int, size: int) -> Tensor:
    """Takes a context-parallel process's tokens of every sequence.

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


def local_positions(seq_length: int, rank: int, size: int) -> Tensor:
    """Returns the positions of a process's tokens, ``[s / size]`` int64, rising."""
    return cut_over_context(torch.arange(seq_length).unsqueeze(0), rank, size).squeeze(0)


def join_over_context(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Puts sequences together, in their order.

    Args:
        tensor: ``[s / size, ...]``, this process's tokens.
        group: The context-parallel processes.

    Returns:
        ``[s, ...]``. The gradient of a token is the sum of what all processes want of it.
    """
    gathered = copy_to_group(gather_from_group(tensor, group, dim=0), group)
    halves = gathered.chunk(2 * group.size())
    return torch.cat([*halves[::2], *halves[::-2]])
