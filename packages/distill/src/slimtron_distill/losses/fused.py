"""The passes over the logits by the Triton kernels: how the work is cut and launched."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from slimtron_distill.losses import kernels
from slimtron_distill.losses.settings import LogitLossSettings
from slimtron_distill.losses.shards import LogitShards
from slimtron_distill.losses.statistics import merge

__all__ = ["divergence_sums", "loss_and_gradient", "scale_gradient", "statistics", "write_gradient"]

_KINDS = {
    "forward_kl": kernels.FORWARD_KL,
    "reverse_kl": kernels.REVERSE_KL,
    "jsd": kernels.JSD,
}
# Measured on an H100, see docs/kd_loss_notes.md. What all programs on the device hold together and
# what lies between the passes must fit into its cache of 50 MB, beside the gradient.
_NUM_WARPS = 4
_THREAD_COLUMNS = 16
"""Columns that a thread has under way, of each of the two models."""

_PART_BYTES = 2**15
"""Logits of both models that one program goes through, about."""

_CACHED_BYTES = 14 * 2**20
"""Logits between two passes over the same token."""


def statistics(shards: LogitShards, weights: Tensor, settings: LogitLossSettings) -> Tensor:
    """See `slimtron_distill.losses.reference.statistics`."""
    parts, _, _ = _launch(shards, weights, settings, phases=(0, 0))
    return merge(parts.movedim(-1, 0), settings).view(5, *weights.shape)


def divergence_sums(
    shards: LogitShards, weights: Tensor, settings: LogitLossSettings, normalizers: Tensor
) -> Tensor:
    """See `slimtron_distill.losses.reference.divergence_sums`."""
    _, sums, _ = _launch(shards, weights, settings, phases=(1, 1), normalizers=normalizers)
    return sums.sum(-1).view(2, *weights.shape)


def write_gradient(
    shards: LogitShards,
    weights: Tensor,
    settings: LogitLossSettings,
    normalizers: Tensor,
    pivot: Tensor,
    out: Tensor,
) -> None:
    """See `slimtron_distill.losses.reference.write_gradient`."""
    last = _last_phase(settings)
    _launch(
        *(shards, weights, settings),
        phases=(last, last),
        normalizers=normalizers,
        pivot=pivot,
        out=out,
    )


def loss_and_gradient(
    shards: LogitShards, weights: Tensor, settings: LogitLossSettings, out: Tensor
) -> Tensor:
    """All passes in one launch, for a vocabulary that is whole: logits are read from memory once.

    Args:
        shards: The logits.
        weights: ``[s, b]``, what each token's loss is multiplied by.
        settings: The loss.
        out: ``[s, b, v]``, takes the gradient; may be the student's logits themselves.

    Returns:
        ``[s, b]``, each token's loss with its weight.
    """
    _, _, losses = _launch(shards, weights, settings, phases=(0, _last_phase(settings)), out=out)
    return losses.view(weights.shape)


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies ``[s, b, v]`` by a number on the device, without a look at it from the host."""
    length, batch, width = gradient.shape
    with _on(gradient.device):
        kernels.scale_kernel[(length * batch,)](
            *(gradient, factor, batch, width, *gradient.stride()),
            CHUNKS=triton.cdiv(width, 4096),
            BLOCK=4096,
        )


def _launch(
    shards: LogitShards,
    weights: Tensor,
    settings: LogitLossSettings,
    *,
    phases: tuple[int, int],
    normalizers: Tensor | None = None,
    pivot: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs some of the phases; one that starts after the first needs the normalizers.

    Returns:
        Of those phases that make them: statistics ``[5, tokens, parts]``, divergence sums
        ``[2, tokens, parts]``, weighted losses ``[tokens]``.
    """
    student, teacher, columns = shards.student, shards.teacher, shards.num_columns
    tokens, first, last = weights.numel(), *phases
    side_by_side = 16 // student.element_size()
    block = 32 * _NUM_WARPS * _THREAD_COLUMNS
    row_bytes = columns * (student.element_size() + teacher.element_size())
    num_parts = triton.next_power_of_2(max(1, round(row_bytes / _PART_BYTES)))
    lag = min(tokens, max(1, round(_CACHED_BYTES / max(1, row_bytes))))
    rounded = triton.cdiv(columns, side_by_side) * side_by_side
    if rounded == columns:
        trim = 0
    else:
        trim = 1 if rounded <= min(student.shape[2], teacher.shape[2]) else 2

    parts = weights.new_empty(5, tokens, num_parts)
    sums = weights.new_empty(2, tokens, num_parts)
    losses = weights.new_empty(tokens)
    progress = torch.zeros(1 + (last - first) * tokens, dtype=torch.int32, device=weights.device)
    unused = weights
    gradient = student if out is None else out
    num_phases = last - first + 1
    with _on(student.device):
        kernels.kd_kernel[((tokens + (num_phases - 1) * lag) * num_phases * num_parts,)](
            *(student, teacher, gradient, weights.contiguous()),
            unused if normalizers is None else normalizers,
            unused if pivot is None else pivot,
            *(parts, sums, losses, progress),
            *(tokens, student.shape[1], columns, student.shape[2]),
            *(*student.stride(), *teacher.stride(), *gradient.stride()),
            *(settings.temperature, settings.beta, lag),
            KIND=_KINDS[settings.divergence],
            FIRST=first,
            LAST=last,
            GRADIENT=out is not None,
            PARTS=num_parts,
            TRIM=trim,
            # Triton's compiler breaks down over a loop that never runs.
            CHUNKS=max(1, triton.cdiv(triton.cdiv(columns, block), num_parts)),
            U=_THREAD_COLUMNS // side_by_side,
            N=32 * _NUM_WARPS,
            C=side_by_side,
            num_warps=_NUM_WARPS,
        )
    return parts, sums, losses


def _last_phase(settings: LogitLossSettings) -> int:
    return 2 if settings.divergence == "jsd" else 1


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
