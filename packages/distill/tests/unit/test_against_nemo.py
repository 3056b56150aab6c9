"""NeMo 2.7.3's own losses on the same tensors: where they agree, and what is not taken over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtron_distill.config import DistillationConfig
from slimtron_distill.hidden import cosine_loss, mse_loss
from slimtron_distill.layers import parse_layer
from slimtron_distill.losses import LogitLossSettings, kd_loss
from slimtron_distill.mixing import LossMixer

nemo = pytest.importorskip("nemo.collections.llm.modelopt.distill.loss", exc_type=ImportError)

CONFIG = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
KEYS = ("student_loss", "LogitsKLLoss_0", "HiddenStateCosineLoss_1")


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 2, 50, generator=generator) * 3
    return student.requires_grad_(), teacher


def _balance(lm: float, kd: float, hidden: float) -> tuple[Tensor, Tensor]:
    """NeMo's total with the language-model loss kept, and its gradient by the KD loss."""
    values = [torch.tensor(x, requires_grad=True) for x in (lm, kd, hidden)]
    balancer = nemo.LogitsAndIntermediatesLossBalancer()
    total = balancer(dict(zip(KEYS, values, strict=True)))["kd_loss"]
    return total, torch.autograd.grad(total, values[1])[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_logits_agree(reverse: bool, logits: tuple[Tensor, Tensor]) -> None:
    theirs, *_ = nemo.LogitsKLLoss(CONFIG, reverse=reverse)(*logits)
    kind: Any = "reverse_kl" if reverse else "forward_kl"
    ours = kd_loss(*logits, LogitLossSettings(kind=kind))
    torch.testing.assert_close(ours, theirs.sum())
    gradients = [torch.autograd.grad(loss, logits[0])[0] for loss in (ours, theirs.sum())]
    torch.testing.assert_close(*gradients)


def test_cosine_agrees(logits: tuple[Tensor, Tensor]) -> None:
    theirs, *_ = nemo.HiddenStateCosineLoss(CONFIG)(*logits)
    torch.testing.assert_close(cosine_loss(*logits), theirs.t())


def test_squared_differences_are_a_mean(logits: tuple[Tensor, Tensor]) -> None:
    theirs, _, is_sequence_parallel = nemo.MSELoss(CONFIG)(*logits)
    torch.testing.assert_close(mse_loss(*logits) * 50, theirs.t())
    # Theirs says of no layout that the sequence is cut.
    assert not is_sequence_parallel


def test_a_temperature_keeps_the_gradient(logits: tuple[Tensor, Tensor]) -> None:
    theirs, *_ = nemo.LogitsKLLoss(CONFIG, temperature=4.0)(*logits)
    ours = kd_loss(*logits, LogitLossSettings(temperature=4.0))
    torch.testing.assert_close(ours, theirs.sum() * 16)


def test_impossible_tokens(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.detach().clone() for x in logits)
    student[..., 40:] = teacher[..., 40:] = -torch.inf
    theirs, *_ = nemo.LogitsKLLoss(CONFIG)(student, teacher)
    assert theirs.isnan().all()
    expected = kd_loss(student[..., :40], teacher[..., :40], LogitLossSettings())
    torch.testing.assert_close(kd_loss(student, teacher, LogitLossSettings()), expected)


def test_masked_tokens_and_uneven_batches(logits: tuple[Tensor, Tensor]) -> None:
    losses = nemo.LogitsKLLoss(CONFIG)(*logits)[0].t()
    mask = torch.zeros(6, 2)
    # What NeMo does with a micro-batch: its own mean.
    assert ((losses * mask).sum() / mask.sum()).isnan()
    assert kd_loss(*logits, LogitLossSettings(), weights=mask).item() == 0
    mask[:, 0], mask[:2, 1] = 1, 1
    micro = [(losses * mask)[:, i].sum() / mask[:, i].sum() for i in range(2)]
    whole = (losses * mask).sum() / mask.sum()
    assert not torch.isclose(sum(micro) / 2, whole)
    sums = [
        kd_loss(*(x[:, i : i + 1] for x in logits), LogitLossSettings(), weights=mask[:, i : i + 1])
        for i in range(2)
    ]
    torch.testing.assert_close(sum(sums) / mask.sum(), whole)


def test_a_loss_of_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        _balance(6.0, 0.0, 0.0)
    for balancer in ("fixed", "dynamic"):
        mixer = LossMixer(DistillationConfig(skip_lm_loss=False, loss_balancer=balancer))
        mixer.observe({"lm_loss": 6.0, "logits_loss": 0.0, "intermediate_loss": 0.0})
        assert mixer.weights.total({"lm_loss": 6.0, "logits_loss": 0.0}) == 6.0


def test_the_total_tells_of_the_teacher_and_its_weight_is_bounded() -> None:
    totals, slopes = zip(*(_balance(6.0, kd, 0.0) for kd in (1.0, 0.1, 0.001)), strict=True)
    assert {round(total.item(), 4) for total in totals} == {12.0}
    assert slopes[2] > 900 * slopes[0]
    config = DistillationConfig(skip_lm_loss=False, loss_balancer="dynamic", max_dynamic_scale=50)
    mixer = LossMixer(config)
    mixer.observe({"lm_loss": 6.0, "logits_loss": 0.001})
    assert mixer.weights.logits == 50
    assert mixer.weights.total({"lm_loss": 6.0, "logits_loss": 0.001}) == pytest.approx(6.05)


def test_a_layer_at_the_end_of_a_name() -> None:
    from nemo.collections.llm.modelopt.distill import utils

    name = utils._adjust_layer_index_for_pp("decoder.layers.3", None)
    # Without a dot behind it the number is not found, and the layer of another stage is taken.
    assert name == "decoder.layers.3"
    assert parse_layer("decoder.layers.3") == (3, "")
    assert parse_layer("decoder.layers.1.mlp.experts.1") == (1, "mlp.experts.1")
