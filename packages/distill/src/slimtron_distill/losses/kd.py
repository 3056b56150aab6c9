"""The knowledge-distillation loss on logits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from slimtron_common.errors import ConfigError
from slimtron_distill.losses import reference
from slimtron_distill.losses.settings import Implementation, LogitLossSettings
from slimtron_distill.losses.shards import LogitShards, token_weights
from slimtron_distill.losses.statistics import gather_parts, kl_divergence, merge, normalizers

__all__ = ["kd_loss"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    settings: LogitLossSettings,
    *,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    """Sums a divergence of the student from the teacher over tokens.

    An entry of the vocabulary with a logit of ``-inf`` is impossible: it has probability 0, and
    ``0 log 0`` is 0. What would make a token's loss infinite is left out of it, as if both had
    ``-inf`` there: in a forward KL the entries that are impossible for the student, in a reverse
    KL those impossible for the teacher. A token without any entry left counts 0. Where logits
    are finite or ``-inf`` the loss and the gradient are finite; NaN and ``+inf`` give NaN.

    The gradient reaches the student's logits only. It is deterministic, bit by bit.

    Args:
        student_logits: ``[s, b, v/tp]`` or ``[n, v/tp]``, bf16, fp16, fp32 or fp64, any strides.
        teacher_logits: The same tokens. Its vocabulary may be padded to another size when
            ``vocab_size`` tells the true one and the shards of the processes line up.
        settings: What to compute.
        weights: ``[s, b]`` floating or bool, the factor of each token's loss; None is 1. A token
            of weight 0 is not looked at. The caller divides by the number of tokens.
        group: The tensor-parallel group that cuts the vocabulary; None when it is whole.
        vocab_size: Entries of the whole vocabulary; columns from there on are padding, which
            is ignored and gets gradient 0. None: there is no padding.
        inplace: Allow the gradient to take the place of the student's logits, which are lost.
        implementation: ``triton``, ``torch``, or ``auto``: by the device.

    Returns:
        Scalar fp32 (fp64 for fp64 logits), the same on every process of the group.

    Raises:
        ConfigError: Shapes, dtypes, strides or settings do not fit each other.
        ParallelismError: The shards of student and teacher do not line up.
    """
    if settings.top_k is not None:
        from slimtron_distill.losses.top_k import kd_loss_from_top_k, teacher_top_k

        indices, top_logits = teacher_top_k(
            teacher_logits, settings.top_k, group=group, vocab_size=vocab_size
        )
        return kd_loss_from_top_k(
            student_logits,
            indices,
            top_logits,
            settings,
            weights=weights,
            group=group,
            vocab_size=vocab_size,
            inplace=inplace,
            implementation=implementation,
        )
    shards = LogitShards.check(student_logits, teacher_logits, group=group, vocab_size=vocab_size)
    if inplace and 0 in student_logits.stride():
        raise ConfigError(
            "expanded logits cannot take the gradient in place", where="inplace", found=True
        )
    wants_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    loss: Tensor = _KDLoss.apply(  # type: ignore[no-untyped-call]
        student_logits,
        shards,
        token_weights(weights, shards),
        settings,
        _passes(implementation, shards),
        inplace,
        wants_gradient,
    )
    return loss


def _passes(implementation: Implementation, shards: LogitShards) -> ModuleType:
    return reference


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        shards: LogitShards,
        weights: Tensor,
        settings: LogitLossSettings,
        passes: ModuleType,
        inplace: bool,
        wants_gradient: bool,
    ) -> Tensor:
        local = passes.statistics(shards, weights, settings)
        merged = merge(gather_parts(local, shards.group), settings)
        norms = normalizers(merged)
        if settings.divergence == "jsd":
            sums = passes.divergence_sums(shards, weights, settings, norms)
            teacher_part, pivot = gather_parts(sums, shards.group).sum(0)
            divergence = settings.beta * teacher_part + (1 - settings.beta) * pivot
        else:
            divergence = pivot = kl_divergence(merged, settings)
        if wants_gradient:
            ctx.save_for_backward(student_logits, shards.teacher, weights, norms, pivot)
            ctx.call = shards, settings, passes, inplace
        weighted = torch.where(weights == 0, 0.0, weights * divergence)
        total = weighted.sum(dtype=torch.float64) * settings.temperature**2
        return total.to(weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, _, weights, norms, pivot = ctx.saved_tensors
        shards, settings, passes, inplace = ctx.call
        gradient = student_logits.detach() if inplace else torch.empty_like(student_logits)
        out = gradient.unsqueeze(1) if gradient.dim() == 2 else gradient
        passes.write_gradient(shards, weights * loss_gradient, settings, norms, pivot, out)
        if inplace:
            increment_version(student_logits)
        return gradient, *[None] * 6
