"""Sums over parts of the vocabulary, and what they make together.

A part is described by five numbers a token, in rows of a tensor ``[5, ...]``:

- the student's largest logit ``a`` and the sum of ``exp((s - a) / T)``
- the teacher's largest logit ``c`` and the sum of ``exp((t - c) / T)``
- the gap: for the forward KL the sum of ``exp((t - c) / T) ((t - c) - (s - a))``, for the reverse
  KL the same with student and teacher exchanged, for JSD nothing (0)

Every sum is relative to its own part's maxima, so that neither huge logits nor a common offset
of them cost accuracy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from slimtron_distill.losses.settings import LogitLossSettings

__all__ = ["gather_parts", "kl_divergence", "merge", "normalizers"]


def gather_parts(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What every process of the group holds, by rank: ``[tp, ...]``."""
    if group is None:
        return local.unsqueeze(0)
    parts = local.new_empty(group.size(), *local.shape)
    dist.all_gather(list(parts.unbind()), local.contiguous(), group=group)
    return parts


def merge(parts: Tensor, settings: LogitLossSettings) -> Tensor:
    """Sums of the whole vocabulary from those of its parts.

    Args:
        parts: ``[parts, 5, s, b]``.
        settings: The loss.

    Returns:
        ``[5, s, b]``, the same statistics of all parts together.
    """
    tops = parts[:, 0::2][:, :2]
    top = tops.amax(0)
    # A part without any entry has -inf for its maximum and 0 for its sums.
    shifts = torch.where(tops == -torch.inf, 0.0, tops - top)
    factors = (shifts / settings.temperature).exp()
    sums = parts[:, 1::2] * factors
    if settings.divergence == "jsd":
        gap = parts[:, 4].sum(0)
    else:
        main = 1 if settings.divergence == "forward_kl" else 0
        shift = shifts[:, main] - shifts[:, 1 - main]
        gap = ((parts[:, 4] + parts[:, 1 + 2 * main] * shift) * factors[:, main]).sum(0)
    student_sum, teacher_sum = sums.sum(0)
    return torch.stack([top[0], student_sum, top[1], teacher_sum, gap])


def normalizers(merged: Tensor) -> Tensor:
    """What turns a logit into a probability.

    Args:
        merged: ``[5, s, b]`` of the whole vocabulary.

    Returns:
        ``[4, s, b]``: student's largest logit, factor, teacher's largest logit, factor: a
        probability is ``factor * exp((logit - largest) / T)``. The factors are 0 where student
        or teacher have no possible entry.
    """
    alive = (merged[1] != 0) & (merged[3] != 0)
    factors = torch.where(alive, 1 / merged[1::2], 0.0)
    tops = torch.where(merged[0:4:2] == -torch.inf, 0.0, merged[0:4:2])
    return torch.stack([tops[0], factors[0], tops[1], factors[1]])


def kl_divergence(merged: Tensor, settings: LogitLossSettings) -> Tensor:
    """KL divergence of each token in nats, without the factor of the temperature: ``[s, b]``."""
    _, student_sum, _, teacher_sum, gap = merged
    if settings.divergence == "forward_kl":
        divergence = gap / teacher_sum / settings.temperature + (student_sum / teacher_sum).log()
    else:
        divergence = gap / student_sum / settings.temperature + (teacher_sum / student_sum).log()
    # Rounding can leave about -1e-7 where the two distributions are all but equal.
    divergence = divergence.clamp(min=0.0)
    return torch.where((student_sum != 0) & (teacher_sum != 0), divergence, 0.0)
