"""The passes over the logits in plain torch: for the CPU, and to check the kernels against.

Each pass takes blocks of tokens to fp32, so that the vocabulary of the whole batch never exists
in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtron_distill.losses.settings import LogitLossSettings
from slimtron_distill.losses.shards import LogitShards

__all__ = ["divergence_sums", "statistics", "write_gradient"]

_BLOCK_ELEMENTS = 2**22
"""Logits in a block: 16 MiB in fp32, 32 tokens of a 128k vocabulary."""


def statistics(shards: LogitShards, weights: Tensor, settings: LogitLossSettings) -> Tensor:
    """Describes each token's local part of the vocabulary.

    Args:
        shards: The logits.
        weights: ``[s, b]``; what is returned for tokens of weight 0 does not matter.
        settings: The loss.

    Returns:
        ``[5, s, b]`` in the compute dtype, see `slimtron_distill.losses.statistics`.
    """
    result = torch.zeros(5, *weights.shape, dtype=weights.dtype, device=weights.device)
    result[0:4:2] = -torch.inf
    if shards.num_columns == 0:
        return result
    for where in shards.pieces(_BLOCK_ELEMENTS):
        student, teacher = _entries(shards, where, settings)
        tops = student.amax(-1), teacher.amax(-1)
        # A token without any entry has -inf for its largest logit.
        student, teacher = (
            logits - top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)
            for logits, top in zip((student, teacher), tops, strict=True)
        )
        student_mass = (student / settings.temperature).exp()
        teacher_mass = (teacher / settings.temperature).exp()
        result[(0, *where)], result[(2, *where)] = tops
        result[(1, *where)] = student_mass.sum(-1)
        result[(3, *where)] = teacher_mass.sum(-1)
        if settings.divergence == "forward_kl":
            result[(4, *where)] = _weighted_sum(teacher_mass, teacher - student)
        elif settings.divergence == "reverse_kl":
            result[(4, *where)] = _weighted_sum(student_mass, student - teacher)
    return result


def divergence_sums(
    shards: LogitShards, weights: Tensor, settings: LogitLossSettings, normalizers: Tensor
) -> Tensor:
    """Local parts of ``KL(p || m)`` and ``KL(q || m)`` of a JSD: ``[2, s, b]``."""
    result = torch.zeros(2, *weights.shape, dtype=weights.dtype, device=weights.device)
    for where in shards.pieces(_BLOCK_ELEMENTS):
        q, p = _probabilities(shards, where, settings, normalizers)
        result[(0, *where)] = _weighted_sum(p, _log_share(p, q, settings.beta))
        result[(1, *where)] = _weighted_sum(q, _log_share(q, p, 1 - settings.beta))
    return result


def write_gradient(
    shards: LogitShards,
    weights: Tensor,
    settings: LogitLossSettings,
    normalizers: Tensor,
    pivot: Tensor,
    out: Tensor,
) -> None:
    """Writes the gradient by the student's logits.

    Args:
        shards: The logits.
        weights: ``[s, b]``, what each token's loss is multiplied by.
        settings: The loss.
        normalizers: ``[4, s, b]`` of the whole vocabulary.
        pivot: ``[s, b]``, the expectation under the student that its gradient is relative to: of a
            reverse KL the gap, of a JSD ``KL(q || m)``; not used for a forward KL.
        out: ``[s, b, v/tp]``; may be the student's logits themselves.
    """
    out[..., shards.num_columns :] = 0
    for where in shards.pieces(_BLOCK_ELEMENTS):
        q, p = _probabilities(shards, where, settings, normalizers)
        if settings.divergence == "forward_kl":
            gradient = q - p
        else:
            if settings.divergence == "reverse_kl":
                factor = 1 / settings.temperature
                values = _gap(shards, where, settings, normalizers)
            else:
                factor = 1 - settings.beta
                values = _log_share(q, p, factor)
            excess = factor * (values - pivot[where].unsqueeze(-1))
            gradient = torch.where(q == 0, 0.0, q * excess)
        scale = (weights[where] * settings.temperature).unsqueeze(-1)
        out[(*where, slice(shards.num_columns))] = torch.where(scale == 0, 0.0, gradient * scale)


def _entries(
    shards: LogitShards, where: tuple[slice, slice], settings: LogitLossSettings
) -> tuple[Tensor, Tensor]:
    """A block of logits without padding; an entry that would make the loss infinite is left out."""
    student, teacher = (
        logits[(*where, slice(shards.num_columns))].to(shards.compute_dtype)
        for logits in (shards.student, shards.teacher)
    )
    if settings.divergence == "forward_kl":
        teacher = teacher.masked_fill(student == -torch.inf, -torch.inf)
    elif settings.divergence == "reverse_kl":
        student = student.masked_fill(teacher == -torch.inf, -torch.inf)
    return student, teacher


def _probabilities(
    shards: LogitShards,
    where: tuple[slice, slice],
    settings: LogitLossSettings,
    normalizers: Tensor,
) -> tuple[Tensor, Tensor]:
    student, teacher = _entries(shards, where, settings)
    tops, factors = normalizers[(slice(0, 4, 2), *where)], normalizers[(slice(1, 4, 2), *where)]
    q, p = (
        factor.unsqueeze(-1) * ((logits - top.unsqueeze(-1)) / settings.temperature).exp()
        for logits, top, factor in zip((student, teacher), tops, factors, strict=True)
    )
    return q, p


def _gap(
    shards: LogitShards,
    where: tuple[slice, slice],
    settings: LogitLossSettings,
    normalizers: Tensor,
) -> Tensor:
    """``log(q / p)`` times the temperature, but for a constant; not defined where q is 0."""
    student, teacher = _entries(shards, where, settings)
    top, _, teacher_top, _ = normalizers[(slice(None), *where)].unsqueeze(-1)
    gap: Tensor = (student - top) - (teacher - teacher_top)
    return gap


def _log_share(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``log(a / m)`` with ``m = weight a + (1 - weight) b``; not defined where a is 0."""
    # In this form m is exactly a where a and b are equal. It may underflow before a does.
    mixture = a + (1 - weight) * (b - a)
    return (a / mixture).clamp(max=1 / weight).log()


def _weighted_sum(mass: Tensor, values: Tensor) -> Tensor:
    # 0 * inf and inf - inf are NaN; an impossible entry has no say.
    terms = torch.where(mass == 0, 0.0, mass * values)
    return terms.sum(-1)
