from __future__ import annotations

import pytest
import torch
from packages.distill.tests.kd_oracle import (
    LOGITS,
    SETTINGS,
    TOLERANCE,
    gradient_error,
    loss_error,
    oracle,
)

from slimtron_common.errors import ConfigError
from slimtron_distill.losses import LogitLossSettings, kd_loss, reference


@pytest.mark.parametrize("name", LOGITS)
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.seed()
    # Blocks of a part of the tokens only.
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 5 * 137)
    for dtype in (torch.float32, torch.bfloat16):
        for settings in SETTINGS:
            student, teacher = (x.to(dtype) for x in LOGITS[name]((6, 2, 137)))
            weights = torch.rand(6, 2)
            weights[-1] = 0
            exact, exact_gradient = oracle(student, teacher, settings, weights)
            logits = student.clone().requires_grad_()
            loss = kd_loss(logits, teacher, settings, weights=weights)
            loss.backward()
            assert logits.grad is not None
            assert loss.dtype == torch.float32
            assert loss_error(loss, exact, weights) <= 2e-6, (settings, seed)
            error = gradient_error(logits.grad, exact_gradient, student, teacher, settings, weights)
            # Rounding to bf16 costs up to 2**-8 of so few numbers.
            limit = 4e-3 if dtype == torch.bfloat16 else TOLERANCE[dtype]
            assert error <= limit, (settings, error, seed)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_in_float64(settings: LogitLossSettings) -> None:
    student, teacher = torch.randn(2, 4, 1, 23, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: kd_loss(s, teacher, settings), student.requires_grad_()
    )


def test_equal_logits_have_loss_and_gradient_0() -> None:
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        logits = (torch.randn(5, 2, 100) * 4).requires_grad_()
        loss = kd_loss(logits, logits.detach().clone(), LogitLossSettings(kind=kind))
        loss.backward()
        assert logits.grad is not None
        assert loss.item() == 0
        assert not logits.grad.any()


def test_ends_of_jsd_are_the_two_divergences() -> None:
    student, teacher = torch.randn(2, 4, 1, 23)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert torch.equal(
            kd_loss(student, teacher, LogitLossSettings(kind="jsd", beta=beta)),
            kd_loss(student, teacher, LogitLossSettings(kind=kind)),
        )
    near = kd_loss(student.double(), teacher.double(), LogitLossSettings(kind="jsd", beta=1e-6))
    limit = kd_loss(student.double(), teacher.double(), LogitLossSettings())
    torch.testing.assert_close(near / 1e-6, limit, rtol=1e-4, atol=0)


def test_padding_of_different_width_is_ignored() -> None:
    student = torch.randn(5, 2, 40).requires_grad_()
    teacher = torch.randn(5, 2, 48)
    loss = kd_loss(student, teacher, LogitLossSettings(), vocab_size=37)
    loss.backward()
    assert torch.equal(loss, kd_loss(student[..., :37], teacher[..., :37], LogitLossSettings()))
    assert student.grad is not None
    assert not student.grad[..., 37:].any()


def test_masked_tokens_are_not_looked_at() -> None:
    student = torch.randn(4, 1, 9)
    student[1] = torch.nan
    student.requires_grad_()
    mask = torch.tensor([[True], [False], [True], [True]])
    loss = kd_loss(student, torch.randn(4, 1, 9), LogitLossSettings(), weights=mask)
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(loss)
    assert torch.equal(student.grad.flatten(1).any(1), mask[:, 0])
    nothing = kd_loss(
        student, student.detach(), LogitLossSettings(), weights=torch.zeros_like(mask)
    )
    student.grad = None
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()


def test_broken_logits_are_seen() -> None:
    for value in (torch.nan, torch.inf):
        student = torch.randn(4, 1, 9)
        student[0, 0, 3] = value
        assert kd_loss(student, torch.randn(4, 1, 9), LogitLossSettings()).isnan()


def test_gradient_in_place() -> None:
    student, teacher = torch.randn(2, 5, 2, 31)
    elsewhere, leaf = (student.clone().requires_grad_() for _ in range(2))
    kd_loss(elsewhere, teacher, LogitLossSettings()).backward()
    kd_loss(leaf, teacher, LogitLossSettings(), inplace=True).backward()
    assert leaf.grad is not None
    assert elsewhere.grad is not None
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    assert torch.equal(leaf.grad, elsewhere.grad)

    logits = elsewhere * 1.0
    other = logits.square().sum()  # Its gradient needs the logits that the loss overwrites.
    kd_loss(logits, teacher, LogitLossSettings(), inplace=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((4, 1, 9), (4, 2, 9), {}, "not of the same tokens"),
        ((9,), (9,), {}, "not of the same tokens"),
        ((4, 1, 9), (4, 1, 8), {}, "differ in vocabulary"),
        ((4, 1, 9), (4, 1, 8), {"vocab_size": 9}, "differ in vocabulary"),
        ((4, 1, 9), (4, 1, 9), {"vocab_size": 10}, "no such vocabulary"),
        ((4, 1, 9), (4, 1, 9), {"weights": torch.ones(1, 4)}, "one weight for each token"),
    ],
)
def test_refusals(
    student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kd_loss(torch.zeros(student), torch.zeros(teacher), LogitLossSettings(), **options)


def test_refuses_what_cannot_be_done() -> None:
    logits = torch.zeros(4, 1, 9)
    with pytest.raises(ConfigError, match="cannot be compared"):
        kd_loss(logits.long(), logits, LogitLossSettings())
    with pytest.raises(ConfigError, match="cannot take the gradient in place"):
        kd_loss(torch.zeros(1, 1, 9).expand(4, 1, 9), logits, LogitLossSettings(), inplace=True)
    for settings in ({"kind": "kl"}, {"beta": 1.5}, {"temperature": 0.0}, {"top_k": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            LogitLossSettings(**settings)
