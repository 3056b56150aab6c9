"""Checks of the loss kernels, for a GPU and for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product

import torch
from packages.distill.tests.kd_oracle import (
    LOGITS,
    SETTINGS,
    TOLERANCE,
    gradient_error,
    loss_error,
    oracle,
)

from slimtron_distill.losses import LogitLossSettings, kd_loss


def check_values(
    device: str,
    shape: tuple[int, ...],
    *,
    settings: Sequence[LogitLossSettings] = SETTINGS,
    kinds: Collection[str] = LOGITS,
    bf16: float = 4e-3,
) -> None:
    """Values and gradients on every kind of logits against float64.

    Args:
        device: Where the kernels run.
        shape: Of the logits.
        settings: The losses.
        kinds: Of logits.
        bf16: Tolerance of gradients in bf16. Rounding alone costs 1.7e-3 on average, and up to
            3.9e-3 of a few numbers.
    """
    seed = torch.seed()
    inplace = False
    for dtype, name, setting in product(TOLERANCE, kinds, settings):
        student, teacher = (x.to(device, dtype) for x in LOGITS[name](shape))
        if dtype == torch.float16:
            student, teacher = (x.clamp(max=60000.0) for x in (student, teacher))
        weights = torch.rand(shape[:-1], device=device)
        weights[-1] = 0
        exact, exact_gradient = oracle(student, teacher, setting, weights)
        inplace = not inplace
        logits = student.clone().requires_grad_()
        loss = kd_loss(
            *(logits, teacher, setting),
            weights=weights,
            inplace=inplace,
            implementation="triton",
        )
        # As a loss scale does: 1e-6 has few digits in fp16.
        scale = 4096.0 if dtype == torch.float16 and name != "huge" else 1.0
        (loss * scale).backward()
        assert logits.grad is not None
        assert (logits.grad.data_ptr() == logits.data_ptr()) == inplace
        where = f"{name} {dtype} {setting} inplace={inplace} seed={seed}"
        error = loss_error(loss, exact, weights)
        assert error <= 2e-6, f"loss off by {error:.1e}: {where}"
        gradient = logits.grad.double() / scale
        error = gradient_error(gradient, exact_gradient, student, teacher, setting, weights)
        limit = bf16 if dtype == torch.bfloat16 else TOLERANCE[dtype]
        assert error <= limit, f"gradient off by {error:.1e}: {where}"


def check_layouts(device: str) -> None:
    """Strides, padding, scaled backward, tokens left out, the same bits twice."""
    torch.manual_seed(torch.seed())
    settings = LogitLossSettings(kind="reverse_kl", temperature=1.3)
    storage = torch.randn(3, 5, 203, device=device), torch.randn(5, 3, 190, device=device)
    for student, teacher in (
        (storage[0], storage[1].transpose(0, 1)),
        (storage[0][:, :, 1:], storage[1].transpose(0, 1)),
        (
            storage[0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
            storage[1].transpose(0, 1)[..., ::2],
        ),
    ):
        vocab_size = min(student.shape[-1], teacher.shape[-1], 171)
        weights = torch.rand(3, 5, device=device) > 0.4
        exact, exact_gradient = oracle(
            student[..., :vocab_size], teacher[..., :vocab_size], settings, weights
        )
        gradients = []
        for _ in range(2):
            logits = student.detach().requires_grad_()
            logits.grad = None
            loss = kd_loss(
                logits,
                teacher,
                settings,
                weights=weights,
                vocab_size=vocab_size,
                implementation="triton",
            )
            (loss * 3).backward()
            assert logits.grad is not None
            gradients.append(logits.grad)
        assert torch.equal(*gradients)
        assert loss_error(loss, exact, weights) <= 2e-6
        assert not gradients[0][..., vocab_size:].any()
        assert not gradients[0][~weights].any()
        error = gradient_error(
            gradients[0][..., :vocab_size] / 3,
            exact_gradient,
            student[..., :vocab_size],
            teacher[..., :vocab_size],
            settings,
            weights,
        )
        assert error <= 2e-6, error
    logits = torch.full((2, 1, 40), torch.nan, device=device).requires_grad_()
    loss = kd_loss(
        logits,
        logits.detach(),
        settings,
        weights=torch.zeros(2, 1, device=device),
        implementation="triton",
    )
    loss.backward()
    assert logits.grad is not None
    assert loss.item() == 0
    assert not logits.grad.any()
