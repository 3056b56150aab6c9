from __future__ import annotations

import pytest
import torch
from packages.distill.tests.kd_oracle import SETTINGS, oracle

from slimtron_common.errors import ConfigError
from slimtron_distill.losses import LogitLossSettings, kd_loss, kd_loss_from_top_k, teacher_top_k


def test_of_equal_logits_the_lowest_index_is_chosen() -> None:
    logits = torch.randint(-3, 3, (5, 2, 100)).bfloat16()
    logits[0] = -0.0
    logits[0, :, ::2] = 0.0
    logits[1, :, 3:] = -torch.inf
    indices, values = teacher_top_k(logits, 9, vocab_size=90)
    exact = logits[..., :90].float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, exact.indices[..., :9])
    assert torch.equal(values.float(), exact.values[..., :9])


@pytest.mark.parametrize("inplace", [False, True])
def test_both_are_renormalized_over_the_entries(inplace: bool) -> None:
    for settings in SETTINGS:
        student, teacher = torch.randn(2, 5, 2, 60)
        weights = torch.rand(5, 2)
        top = teacher.topk(8)
        exact, gradient = oracle(student.gather(-1, top.indices), top.values, settings, weights)
        logits = student.clone().requires_grad_()
        loss = kd_loss_from_top_k(
            logits, top.indices, top.values, settings, weights=weights, inplace=inplace
        )
        loss.backward()
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-7)
        whole = torch.zeros(5, 2, 60, dtype=torch.float64).scatter(-1, top.indices, gradient)
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad.double(), whole, rtol=1e-5, atol=1e-6)


def test_all_entries_are_the_whole_loss() -> None:
    student, teacher = torch.randn(2, 5, 2, 60)
    teacher[..., 7] = -torch.inf
    student[..., 7] = -torch.inf
    whole = kd_loss(student, teacher, LogitLossSettings(kind="jsd"))
    top = kd_loss(student, teacher, LogitLossSettings(kind="jsd", top_k=60))
    torch.testing.assert_close(top, whole)


def test_refusals() -> None:
    logits = torch.zeros(4, 1, 9)
    with pytest.raises(ConfigError, match="than the vocabulary has"):
        kd_loss(logits, logits, LogitLossSettings(top_k=9), vocab_size=8)
    indices, values = teacher_top_k(logits, 3)
    with pytest.raises(ConfigError, match="not as many"):
        kd_loss_from_top_k(logits, indices, values, LogitLossSettings(top_k=4))
    with pytest.raises(ConfigError, match="not of the student's tokens"):
        kd_loss_from_top_k(logits[:2], indices, values, LogitLossSettings())
