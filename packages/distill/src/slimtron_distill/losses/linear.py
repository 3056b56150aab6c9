"""The loss of two output layers, without the logits of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from slimtron_common.errors import ConfigError
from slimtron_distill.losses.kd import kd_loss
from slimtron_distill.losses.settings import Implementation, LogitLossSettings

__all__ = ["linear_kd_loss"]

_TOKEN_MULTIPLE = 128
"""Chunks are multiples of so many tokens: the tiles of matrix products."""

_SHARE_OF_FREE_MEMORY = 0.25
_HOST_LOGIT_BYTES = 2**28


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    settings: LogitLossSettings,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    main_grad: Tensor | None = None,
    gradient_scale: float = 1.0,
    logit_bytes: int | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Computes `kd_loss` of ``hidden @ weight.T + bias``, a chunk of tokens at a time.

    The gradients are made along with the loss, those of weight and bias summed over the chunks in
    fp32; backward hands them out, scaled. The size of the chunks changes the order of the sums: set
    ``logit_bytes`` where each run must give the same bits.

    Args:
        student_hidden: ``[s, b, h]`` or ``[n, h]``, input of the student's output layer, the same
            on every process of the group; with ``sequence_parallel`` its own part of the first
            dimension.
        student_weight: ``[v/tp, h]``, of the hidden states' dtype; may be an embedding's, too.
        teacher_hidden: The same tokens; its ``h`` may be another. No gradient reaches the teacher.
        teacher_weight: ``[v/tp, h]`` of the teacher.
        settings: What to compute.
        student_bias: ``[v/tp]``.
        teacher_bias: ``[v/tp]``.
        weights: ``[s, b]`` as in `kd_loss`, of the whole sequence.
        group: The tensor-parallel group; None when the vocabulary is whole.
        sequence_parallel: Whether the group cuts the hidden states along the sequence.
        vocab_size: As in `kd_loss`.
        main_grad: ``[v/tp, h]`` fp32, to which the gradient of the student's weight is added during
            this call: Megatron's ``weight.main_grad``. Backward marks the weight as Megatron's
            fused layers do (``grad_added_to_main_grad``), and heeds ``zero_out_wgrad``, the mark
            of an embedding that is the output layer's weight, too.
        gradient_scale: The gradient that will arrive at the loss, loss scale over number of tokens
            say. Another one may come but with ``main_grad``; in fp16, tell it to avoid underflow.
        logit_bytes: Memory for the logits of a chunk; None takes a quarter of what is free.
        implementation: As in `kd_loss`.

    Returns:
        Scalar fp32, the same on every process of the group.

    Raises:
        ConfigError: Shapes, dtypes or settings do not fit each other; on backward with
            ``main_grad``, what arrives is not ``gradient_scale``.
        ParallelismError: The shards of student and teacher do not line up.
    """
    _check(student_hidden, student_weight, student_bias, "student")
    _check(teacher_hidden, teacher_weight, teacher_bias, "teacher")
    if main_grad is not None and (
        main_grad.shape != student_weight.shape or main_grad.dtype != torch.float32
    ):
        raise ConfigError(
            "the gradient cannot be added here",
            where="main_grad",
            found=f"{main_grad.dtype} {list(main_grad.shape)}",
            allowed=f"torch.float32 {list(student_weight.shape)}",
        )
    if group is not None and group.size() > 1:
        from slimtron_common.parallel.collectives import copy_to_group, gather_from_group

        if sequence_parallel:
            student_hidden = gather_from_group(student_hidden, group, dim=0)
            with torch.no_grad():
                teacher_hidden = gather_from_group(teacher_hidden, group, dim=0)
        # Each process goes on with its own part of the vocabulary.
        student_hidden = copy_to_group(student_hidden, group)
    tokens = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != tokens:
        raise ConfigError(
            "student and teacher hidden states are not of the same tokens",
            where="teacher_hidden",
            found=list(teacher_hidden.shape),
            allowed=[*tokens, "h"],
        )
    if weights is None:
        weights = torch.ones(tokens, device=student_hidden.device)
    call = _Call(
        teacher_hidden=teacher_hidden.detach().flatten(0, -2),
        teacher_weight=teacher_weight.detach(),
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        settings=settings,
        weights=weights.detach().flatten(),
        group=group,
        vocab_size=vocab_size,
        main_grad=main_grad,
        gradient_scale=gradient_scale,
        logit_bytes=logit_bytes,
        implementation=implementation,
    )
    loss: Tensor = _LinearKDLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_weight, student_bias, call, torch.is_grad_enabled()
    )
    return loss


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    settings: LogitLossSettings
    weights: Tensor
    group: dist.ProcessGroup | None
    vocab_size: int | None
    main_grad: Tensor | None
    gradient_scale: float
    logit_bytes: int | None
    implementation: Implementation


class _LinearKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        call: _Call,
        wants_gradient: bool,
    ) -> Tensor:
        needs = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        hidden = student_hidden.flatten(0, -2)
        hidden_gradient = torch.empty_like(hidden) if needs[0] else None
        weight_gradient = call.main_grad if needs[1] else None
        bias_gradient = None
        if student_bias is not None and needs[2]:
            bias_gradient = torch.zeros_like(student_bias, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for chunk in _chunks(hidden, student_weight, call):
            with torch.enable_grad():
                logits = F.linear(hidden[chunk], student_weight.detach(), student_bias).detach()
                teacher_logits = F.linear(
                    call.teacher_hidden[chunk], call.teacher_weight, call.teacher_bias
                )
                loss = kd_loss(
                    logits.requires_grad_(any(needs)),
                    teacher_logits,
                    call.settings,
                    weights=call.weights[chunk].float() * call.gradient_scale,
                    group=call.group,
                    vocab_size=call.vocab_size,
                    inplace=True,
                    implementation=call.implementation,
                )
            total += loss.detach()
            if any(needs):
                (gradient,) = torch.autograd.grad(loss, logits)
                if hidden_gradient is not None:
                    torch.mm(gradient, student_weight, out=hidden_gradient[chunk])
                if needs[1]:
                    weight_gradient = _add_product(weight_gradient, gradient, hidden[chunk])
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(0, dtype=torch.float32)
                del gradient
            # The next chunk takes their memory.
            del logits, teacher_logits, loss
        ctx.save_for_backward(student_weight)
        ctx.call, ctx.bias = call, student_bias
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.view(student_hidden.shape)
        ctx.gradients = hidden_gradient, weight_gradient, bias_gradient
        return (total / call.gradient_scale).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (student_weight,) = ctx.saved_tensors
        call: _Call = ctx.call
        hidden_gradient, weight_gradient, bias_gradient = ctx.gradients
        ctx.gradients = None
        factor = loss_gradient / call.gradient_scale
        if hidden_gradient is not None:
            hidden_gradient.mul_(factor)
        if weight_gradient is not None:
            if call.main_grad is None:
                weight_gradient = _scaled(weight_gradient, factor, student_weight)
            else:
                weight_gradient = _settle(student_weight, loss_gradient, call.gradient_scale)
        if bias_gradient is not None:
            bias_gradient = _scaled(bias_gradient, factor, ctx.bias)
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    if (
        hidden.dim() not in (2, 3)
        or weight.dim() != 2
        or hidden.shape[-1] != weight.shape[1]
        or hidden.dtype != weight.dtype
        or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype))
    ):
        found = f"{hidden.dtype} {list(hidden.shape)} and {weight.dtype} {list(weight.shape)}"
        raise ConfigError(
            "hidden states and output layer do not fit each other",
            where=name,
            found=found if bias is None else f"{found}, bias {bias.dtype} {list(bias.shape)}",
            allowed="[s, b, h] or [n, h] and [v/tp, h], bias [v/tp], of one dtype",
        )


def _chunks(hidden: Tensor, weight: Tensor, call: _Call) -> list[slice]:
    """Cuts the tokens into about equal chunks whose logits fit into the memory for them."""
    num_tokens = len(hidden)
    token_bytes = (
        len(weight) * weight.element_size()
        + len(call.teacher_weight) * call.teacher_weight.element_size()
    )
    budget = call.logit_bytes
    if budget is None:
        budget = _free_bytes(hidden.device, call.group)
    most = max(_TOKEN_MULTIPLE, budget // token_bytes // _TOKEN_MULTIPLE * _TOKEN_MULTIPLE)
    num_chunks = -(-num_tokens // most)
    size = -(-num_tokens // max(1, num_chunks))
    size = -(-size // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _free_bytes(device: torch.device, group: dist.ProcessGroup | None) -> int:
    """A share of the free memory, the same on every process of the group."""
    if device.type != "cuda":
        return _HOST_LOGIT_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    # What torch's allocator keeps for reuse is free, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = torch.tensor(int(free * _SHARE_OF_FREE_MEMORY), device=device)
    if group is not None:
        dist.all_reduce(share, op=dist.ReduceOp.MIN, group=group)
    return int(share)


def _add_product(total: Tensor | None, gradient: Tensor, hidden: Tensor) -> Tensor:
    """Adds ``gradient.T @ hidden`` to a total in fp32: ``[v/tp, h]``."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(gradient.t(), hidden, out_dtype=torch.float32)
        return torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
    # Products of 16 bits into fp32 exist on CUDA only.
    product = gradient.t().to(torch.float32), hidden.to(torch.float32)
    return torch.mm(*product) if total is None else total.addmm_(*product)


def _scaled(gradient: Tensor, factor: Tensor, parameter: Tensor) -> Tensor:
    return torch.mul(gradient, factor, out=torch.empty_like(parameter))


def _settle(weight: Tensor, loss_gradient: Tensor, expected: float) -> Tensor:
    """What autograd gets for a gradient that is in ``main_grad`` already."""
    if not torch.isclose(loss_gradient, torch.full_like(loss_gradient, expected), rtol=1e-6):
        raise ConfigError(
            "the gradient of the weight has been added to main_grad at another scale",
            where="gradient_scale",
            found=expected,
            allowed=f"{float(loss_gradient)}, what arrived at the loss",
        )
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        # Megatron's hook adds this one nevertheless, for the embedding's gradient in it.
        return torch.zeros_like(weight)
    # The hook waits for a gradient; it looks at the mark and drops this one unread.
    return torch.empty_like(weight)
