"""The loss against the text itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

__all__ = ["language_model_loss"]


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int | None,
) -> Tensor:
    """Negative log-likelihood of the labels, summed over tokens.

    Args:
        logits: ``[b, s, v/tp]``, the local vocabulary shard.
        labels: ``[b, s]`` int64. What is masked may hold any number.
        loss_mask: ``[b, s]``, the factor of each token; 0 leaves it out.
        group: The tensor-parallel group.
        vocab_size: Entries of the whole vocabulary without padding; None if there is none.

    Returns:
        A scalar, fp32.
    """
    # Megatron's function overwrites its input.
    logits = logits.to(torch.float32, copy=True)
    if vocab_size is not None:
        columns = max(0, vocab_size - group.rank() * logits.shape[-1])
        logits[..., columns:] = -torch.inf
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels)
    # Not a product: what is left out may be infinite.
    return torch.where(loss_mask != 0, losses * loss_mask, 0.0).sum()
