"""Collectives with gradients that are right for a loss that every process computes alike.

In tensor parallelism each process of a group goes on to the same loss. The gradient of a value
that all of them hold is then the same on each and must not be summed again: upstream losses that
call ``torch.distributed.nn``'s collectives come out with gradients as many times too large as
there are processes. The pairs here are those of Megatron-LM (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["copy_to_group", "gather_from_group", "max_over_group", "sum_over_group"]


def sum_over_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sums the processes' own tensors into one that all hold.

    Args:
        tensor: Any shape, the same on every process.
        group: The processes; None stands for this one alone.

    Returns:
        The sum. Its gradient reaches each process's tensor unchanged.
    """
    if not _is_shared(group):
        return tensor
    result: Tensor = _Sum.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def copy_to_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Marks where a tensor that all processes hold is used differently by each.

    Returns:
        ``tensor``. Its gradient is the sum of the processes' gradients.
    """
    if not _is_shared(group):
        return tensor
    result: Tensor = _Copy.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def gather_from_group(tensor: Tensor, group: dist.ProcessGroup | None, *, dim: int) -> Tensor:
    """Puts the processes' tensors side by side into one that all hold.

    Args:
        tensor: Any shape, the same on every process.
        group: The processes; None stands for this one alone.
        dim: The dimension to put them along, by rank.

    Returns:
        The whole. Each process gets its own part of the gradient.
    """
    if not _is_shared(group):
        return tensor
    result: Tensor = _Gather.apply(tensor, group, dim)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def max_over_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the elementwise largest of the processes' tensors, without a gradient."""
    result = tensor.detach().clone()
    if _is_shared(group):
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def _is_shared(group: dist.ProcessGroup | None) -> TypeGuard[dist.ProcessGroup]:
    return group is not None and group.size() > 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        result = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return torch.cat(parts, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()]
        return own.contiguous(), None, None
