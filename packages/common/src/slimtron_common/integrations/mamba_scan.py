"""The scan of a Mamba-2 layer in plain torch, which runs on every device.

The state-space duality of Dao and Gu (arXiv:2405.21060): within a chunk of the sequence the layer
is a masked attention, and between chunks one state a head is handed on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_rms_norm", "split_conv_scan", "state_space_scan"]


def split_conv_scan(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    decay: Tensor,
    *,
    skip: Tensor,
    num_groups: int,
    head_dim: int,
    chunk_size: int,
) -> Tensor:
    """Computes a Mamba-2 layer between its two projections, but for the norm.

    Args:
        projected: Gate, input, B, C and time steps side by side,
            ``[b, s, 2 * heads * p + 2 * groups * n + heads]``.
        conv_weight: Of the causal convolution over input, B and C, ``[channels, width]``.
        conv_bias: ``[channels]``.
        dt_bias: Added to the time steps before the softplus, ``[heads]``.
        decay: Rate at which a head forgets, below 0, ``[heads]``.
        skip: What goes past the state, ``[heads]``.
        num_groups: Groups of heads that share B and C.
        head_dim: Channels of a head, ``p``.
        chunk_size: Tokens of a chunk.

    Returns:
        The gated output ``[b, s, heads * p]``, in the type of ``projected``.
    """
    size, length, _ = projected.shape
    heads = len(dt_bias)
    inner = heads * head_dim
    convolved = conv_weight.shape[0]
    states = (convolved - inner) // 2
    gate, mixed, steps = torch.split(projected, [inner, convolved, heads], -1)
    width = conv_weight.shape[1]
    padded = F.pad(mixed.transpose(1, 2), (width - 1, 0))
    mixed = F.conv1d(padded, conv_weight.unsqueeze(1), conv_bias, groups=convolved)
    mixed = F.silu(mixed).transpose(1, 2).float()
    x, b, c = torch.split(mixed, [inner, states, states], -1)
    x = x.reshape(size, length, heads, head_dim)
    y = state_space_scan(
        x,
        F.softplus(steps.float() + dt_bias.float()),
        decay.float(),
        b.reshape(size, length, num_groups, -1),
        c.reshape(size, length, num_groups, -1),
        chunk_size,
    )
    y = (y + skip.float().unsqueeze(-1) * x).flatten(-2)
    gated: Tensor = (y * F.silu(gate.float())).to(projected.dtype)
    return gated


def state_space_scan(
    x: Tensor, steps: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk_size: int
) -> Tensor:
    """Runs the recurrence ``h_t = exp(steps_t * decay) h_(t-1) + steps_t x_t b_t', y_t = h_t c_t``.

    Args:
        x: Input ``[b, s, heads, p]``.
        steps: Time steps, above 0, ``[b, s, heads]``.
        decay: ``[heads]``, below 0.
        b: What a token writes, ``[b, s, groups, n]``.
        c: What a token reads, ``[b, s, groups, n]``.
        chunk_size: Tokens that are computed at once.

    Returns:
        ``[b, s, heads, p]``.
    """
    heads_of_group = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(heads_of_group, 2) for t in (b, c))
    state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1])
    along = (x * steps.unsqueeze(-1), steps * decay, b, c)
    chunks = zip(*(torch.split(t, chunk_size, 1) for t in along), strict=True)
    outputs = []
    for written, rates, keys, queries in chunks:
        # Logarithm of what is left, at each token, of what was there before the chunk.
        left = rates.cumsum(1).transpose(1, 2)
        later = torch.ones(left.shape[-1], left.shape[-1], dtype=torch.bool, device=x.device)
        between = (left.unsqueeze(-1) - left.unsqueeze(-2)).masked_fill(~later.tril(), -torch.inf)
        attention = torch.einsum("blhn,bshn->bhls", queries, keys) * between.exp()
        y = torch.einsum("bhls,bshp->blhp", attention, written)
        y = y + torch.einsum("blhn,bhpn,bhl->blhp", queries, state, left.exp())
        outputs.append(y)
        until_end = (left[..., -1:] - left).exp()
        added = torch.einsum("bshn,bhs,bshp->bhpn", keys, until_end, written)
        state = state * left[..., -1].exp()[..., None, None] + added
    return torch.cat(outputs, 1)


def gated_rms_norm(x: Tensor, weight: Tensor, group_size: int, epsilon: float) -> Tensor:
    """Normalises each group of channels by its root mean square.

    Args:
        x: ``[..., c]``.
        weight: ``[c]``.
        group_size: Channels of a group.
        epsilon: Added to the mean square.

    Returns:
        ``[..., c]``, in the type of ``x``.
    """
    grouped = x.float().reshape(*x.shape[:-1], -1, group_size)
    normalized = F.rms_norm(grouped, (group_size,), eps=epsilon).flatten(-2)
    weighted: Tensor = (normalized * weight.float()).to(x.dtype)
    return weighted
