from __future__ import annotations

import pytest
import torch
from packages.distill.tests.kd_kernels import check_layouts, check_values
from packages.distill.tests.kd_oracle import loss_error, oracle

from slimtron_distill.losses import LogitLossSettings, kd_loss


@pytest.mark.parametrize("width", [37, 4096, 128256])
def test_values_and_gradients(width: int) -> None:
    check_values("cuda", (5, 2, width))


def test_bf16_gradients_of_random_logits() -> None:
    check_values("cuda", (64, 1, 32003), kinds=("normal",), bf16=2e-3)


def test_layouts() -> None:
    check_layouts("cuda")


def test_offsets_beyond_31_bits() -> None:
    width = 256000
    logits = torch.randn(8500, width, device="cuda", dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    teacher = torch.randn_like(logits)
    tail = logits[-4:].clone(), teacher[-4:].clone()
    weights = torch.zeros(len(logits), device="cuda")
    weights[-4:] = 1
    settings = LogitLossSettings()
    exact, gradient = oracle(*tail, settings, weights[-4:])
    logits.requires_grad_()
    loss = kd_loss(logits, teacher, settings, weights=weights, inplace=True)
    loss.backward()
    assert loss_error(loss, exact, weights) <= 2e-6
    assert float((logits.grad[-4:].double() - gradient).norm() / gradient.norm()) <= 2e-3
    assert not logits.grad[:-4].any()


def test_many_runs_give_the_same_bits() -> None:
    student, teacher = torch.randn(2, 700, 1, 50257, device="cuda", dtype=torch.bfloat16)
    results = []
    for _ in range(20):
        logits = student.clone().requires_grad_()
        loss = kd_loss(logits, teacher, LogitLossSettings(kind="jsd"))
        loss.backward()
        results.append((loss.item(), logits.grad))
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])
