"""The knowledge-distillation loss on logits."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from slimtron_common.errors import ConfigError, MissingDependencyError
from slimtron_distill.losses import reference
from slimtron_distill.losses.settings import Implementation, LogitLossSettings
from slimtron_distill.losses.shards import LogitShards, three_dimensional, token_weights
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
    """The module whose passes go over the logits."""
    on_gpu = shards.student.is_cuda
    if implementation == "torch":
        return reference
    # The kernels compute in fp32.
    if implementation == "auto" and (not on_gpu or shards.compute_dtype == torch.float64):
        return reference
    try:
        from slimtron_distill.losses import fused
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise MissingDependencyError(
            "the loss kernels need Triton",
            where="implementation",
            found=implementation,
            hint="install triton, or set implementation to torch",
        ) from error
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if shards.compute_dtype == torch.float64 or not (on_gpu or interpreted):
        raise ConfigError(
            "Triton cannot work on these logits",
            where="implementation",
            found=f"{shards.student.dtype} on {shards.student.device}",
            allowed="bf16, fp16 or fp32 on a GPU, or on the CPU with TRITON_INTERPRET=1",
        )
    return fused


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
        ctx.call = shards, settings, passes, inplace
        # Where all passes fit into one launch the gradient is made along with the loss. In fp16 it
        # would underflow before the loss scale arrives.
        ctx.is_made = (
            wants_gradient
            and passes is not reference
            and shards.group is None
            and student_logits.dtype != torch.float16
        )
        if ctx.is_made:
            gradient = _gradient_of(student_logits, inplace)
            losses: Tensor = passes.loss_and_gradient(
                shards, weights, settings, three_dimensional(gradient)
            )
            if inplace:
                increment_version(student_logits)
            ctx.save_for_backward(gradient)
        else:
            norms, pivot, divergence = _divergence(shards, weights, settings, passes)
            losses = torch.where(weights == 0, 0.0, weights * divergence * settings.temperature**2)
            if wants_gradient:
                ctx.save_for_backward(student_logits, shards.teacher, weights, norms, pivot)
        return losses.sum(dtype=torch.float64).to(weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        shards, settings, passes, inplace = ctx.call
        if ctx.is_made:
            (gradient,) = ctx.saved_tensors
            passes.scale_gradient(three_dimensional(gradient), loss_gradient)
            # It can be handed out once.
            increment_version(gradient)
        else:
            student_logits, _, weights, norms, pivot = ctx.saved_tensors
            gradient = _gradient_of(student_logits, inplace)
            out = three_dimensional(gradient)
            passes.write_gradient(shards, weights * loss_gradient, settings, norms, pivot, out)
            if inplace:
                increment_version(student_logits)
        return gradient, *[None] * 6


def _divergence(
    shards: LogitShards, weights: Tensor, settings: LogitLossSettings, passes: ModuleType
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient needs, and each token's divergence in nats without any factor."""
    local = passes.statistics(shards, weights, settings)
    merged = merge(gather_parts(local, shards.group), settings)
    norms = normalizers(merged)
    if settings.divergence != "jsd":
        return norms, merged[4] * norms[1], kl_divergence(merged, settings)
    sums = passes.divergence_sums(shards, weights, settings, norms)
    teacher_part, student_part = gather_parts(sums, shards.group).sum(0)
    divergence = settings.beta * teacher_part + (1 - settings.beta) * student_part
    return norms, student_part, divergence


def _gradient_of(logits: Tensor, inplace: bool) -> Tensor:
    return logits.detach() if inplace else torch.empty_like(logits)
