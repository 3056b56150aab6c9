"""The weights of losses against their definition."""

from __future__ import annotations

import math

import pytest

from slimtron_distill.config import DistillationConfig
from slimtron_distill.mixing import LossMixer, LossWeights

LOSSES = {"lm_loss": 6.0, "logits_loss": 2.0, "intermediate_loss": 0.5}


def test_without_the_language_loss_the_teacher_counts_as_it_is() -> None:
    mixer = LossMixer(DistillationConfig(kd_loss_scale=7.0, intermediate_loss_scale=3.0))
    assert mixer.weights == LossWeights(lm=0.0, logits=1.0, intermediate=3.0)
    mixer.observe(LOSSES)
    assert mixer.weights == LossWeights(lm=0.0, logits=1.0, intermediate=3.0)
    assert mixer.weights.total(LOSSES) == 2.0 + 3.0 * 0.5


def test_the_scale_weighs_the_teacher_against_the_language_loss() -> None:
    config = DistillationConfig(skip_lm_loss=False, kd_loss_scale=2.0, intermediate_loss_scale=3.0)
    weights = LossMixer(config).weights
    assert weights.total(LOSSES) == 6.0 + 2.0 * (2.0 + 3.0 * 0.5)


def test_dynamic_weights_bring_losses_to_one_size_a_step_later() -> None:
    mixer = LossMixer(DistillationConfig(skip_lm_loss=False, loss_balancer="dynamic"))
    assert mixer.weights == LossWeights(lm=1.0, logits=1.0, intermediate=1.0)
    mixer.observe(LOSSES)
    weights = mixer.weights
    assert weights.intermediate * 0.5 == weights.logits * 2.0
    assert weights.logits * 2.0 + weights.intermediate * 0.5 == pytest.approx(6.0)
    other = LossMixer(DistillationConfig(skip_lm_loss=False, loss_balancer="dynamic"))
    other.load_state_dict(mixer.state_dict())
    assert other.weights == weights


@pytest.mark.parametrize("kd", [1e-3, 1e-9, 0.0, math.nan, math.inf])
def test_dynamic_weights_are_bounded(kd: float) -> None:
    config = DistillationConfig(skip_lm_loss=False, loss_balancer="dynamic", max_dynamic_scale=10.0)
    mixer = LossMixer(config)
    mixer.observe({"lm_loss": 6.0, "logits_loss": kd, "intermediate_loss": 1.0})
    weights = mixer.weights
    for value in (weights.logits, weights.intermediate):
        assert 1 / 100 <= value <= 100
    # More of what is learned from the teacher is more in the total, whatever the balance.
    assert weights.total({"lm_loss": 6.0, "logits_loss": 2.0}) > weights.total({"lm_loss": 6.0})
