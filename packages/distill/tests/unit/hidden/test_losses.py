"""Losses on hidden states against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slimtron_distill.hidden import cosine_loss, mse_loss


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, 16, generator=generator)
    return student.requires_grad_(), teacher


def test_cosine(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = states
    expected = 1 - F.cosine_similarity(student.double(), teacher.double(), dim=-1)
    torch.testing.assert_close(cosine_loss(student, teacher).double(), expected, atol=1e-6, rtol=0)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    (found,) = torch.autograd.grad(cosine_loss(student, teacher).sum(), student)
    torch.testing.assert_close(found, wanted)


def test_mse_is_a_mean_over_channels(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = states
    expected = F.mse_loss(student.double(), teacher.double(), reduction="none").mean(-1)
    torch.testing.assert_close(mse_loss(student, teacher).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [cosine_loss, mse_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_states_cost_exactly_nothing(loss: object, dtype: torch.dtype) -> None:
    assert callable(loss)
    student = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    student.requires_grad_()
    value = loss(student, student.detach().clone())
    value.sum().backward()
    assert value.dtype == torch.float32
    assert not value.any()
    assert student.grad is not None
    assert not student.grad.any()


def test_a_zero_vector_has_a_gradient() -> None:
    student = torch.zeros(1, 1, 4, requires_grad=True)
    value = cosine_loss(student, torch.ones(1, 1, 4))
    value.sum().backward()
    assert value.item() == pytest.approx(0.5)
    assert student.grad is not None
    assert student.grad.isfinite().all()
