from __future__ import annotations

import pytest
import torch

from slimtron_common.errors import ConfigError
from slimtron_distill.losses import LogitLossSettings, kd_loss, linear_kd_loss

SETTINGS = (
    LogitLossSettings(),
    LogitLossSettings(kind="reverse_kl", temperature=2.0),
    LogitLossSettings(kind="jsd", beta=0.2),
    LogitLossSettings(top_k=7),
)


@pytest.mark.parametrize("into_main_grad", [False, True])
def test_chunks_give_the_loss_and_gradients_of_the_whole(into_main_grad: bool) -> None:
    for settings in SETTINGS:
        hidden, teacher = torch.randn(150, 2, 16), torch.randn(150, 2, 24)
        head, teacher_head, bias = torch.randn(50, 16), torch.randn(50, 24), torch.randn(50)
        weights = torch.rand(150, 2)
        exact = [x.double().requires_grad_() for x in (hidden, head, bias)]
        loss = kd_loss(
            exact[0] @ exact[1].t() + exact[2],
            teacher.double() @ teacher_head.double().t(),
            settings,
            weights=weights,
            vocab_size=47,
        )
        (loss * 3).backward()
        leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
        main_grad = torch.ones_like(head)
        own = linear_kd_loss(
            *(leaves[0], leaves[1], teacher, teacher_head, settings),
            student_bias=leaves[2],
            weights=weights,
            vocab_size=47,
            main_grad=main_grad if into_main_grad else None,
            gradient_scale=3.0 if into_main_grad else 1.0,
            logit_bytes=1,
        )
        (own * 3).backward()
        torch.testing.assert_close(own.double(), loss, rtol=2e-6, atol=0)
        gradients = [leaf.grad for leaf in leaves]
        if into_main_grad:
            assert leaves[1].grad_added_to_main_grad
            gradients[1] = main_grad - 1
        for gradient, leaf in zip(gradients, exact, strict=True):
            error = (gradient.double() - leaf.grad).norm() / leaf.grad.norm()
            assert float(error) < 3e-6, settings


def test_only_what_is_asked_for_is_made() -> None:
    hidden, head = torch.randn(10, 8), torch.randn(20, 8).requires_grad_()
    loss = linear_kd_loss(hidden, head, hidden, torch.randn(20, 8), LogitLossSettings())
    loss.backward()
    assert head.grad is not None
    with torch.no_grad():
        again = linear_kd_loss(hidden, head, hidden, head, LogitLossSettings())
    assert not again.requires_grad
    assert again.item() == 0


def test_refusals() -> None:
    hidden, head = torch.randn(10, 8), torch.randn(20, 8).requires_grad_()
    settings = LogitLossSettings()
    with pytest.raises(ConfigError, match="do not fit each other"):
        linear_kd_loss(hidden, head, hidden, torch.randn(20, 9), settings)
    with pytest.raises(ConfigError, match="not of the same tokens"):
        linear_kd_loss(hidden, head, hidden[:5], head.detach(), settings)
    with pytest.raises(ConfigError, match="main_grad"):
        linear_kd_loss(hidden, head, hidden, head.detach(), settings, main_grad=torch.zeros(2, 2))
    loss = linear_kd_loss(
        hidden, head, hidden, torch.randn(20, 8), settings, main_grad=torch.zeros(20, 8)
    )
    with pytest.raises(ConfigError, match="another scale"):
        (loss * 2).backward()
