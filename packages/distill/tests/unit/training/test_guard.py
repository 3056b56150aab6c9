from __future__ import annotations

import math

import pytest

from slimtron_common.errors import ConfigError
from slimtron_distill.training.config import GuardConfig
from slimtron_distill.training.guard import Guard, UnstableTrainingError


def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_by_default() -> None:
    guard = Guard(GuardConfig())
    assert guard.permits(1, 2.0, 1.0)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        with pytest.raises(UnstableTrainingError, match="step 2") as caught:
            guard.permits(2, loss, norm)
        assert caught.value.exit_code == 1
    assert guard.skipped == 0


def test_skipped_updates_are_counted_told_and_limited(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(GuardConfig(action="skip", max_skipped=2))
    assert not guard.permits(1, math.nan, 1.0)
    assert not guard.permits(2, 1.0, math.inf)
    assert guard.permits(3, 1.0, 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "step 1 is left out (1 so far): the loss is nan",
        "step 2 is left out (2 so far): the gradient's norm is inf",
    ]
    with pytest.raises(UnstableTrainingError, match="too many"):
        guard.permits(4, math.nan, 1.0)


def test_a_jump_is_judged_by_the_median_of_good_losses_alone() -> None:
    guard = Guard(GuardConfig(action="skip", spike_factor=2.0, window=3))
    # Nothing is a jump before the window is full.
    assert all(guard.permits(i, loss, 1.0) for i, loss in enumerate((1.0, 9.0, 1.0)))
    assert not guard.permits(4, 2.5, 1.0)
    # What was left out does not shift the median.
    assert not guard.permits(5, 2.5, 1.0)
    assert guard.permits(6, 1.9, 1.0)


def test_the_state_goes_on() -> None:
    config = GuardConfig(action="skip", spike_factor=2.0, window=2)
    first = Guard(config)
    for step, loss in enumerate((1.0, 1.0, 5.0)):
        first.permits(step, loss, 1.0)
    second = Guard(config)
    second.load_state_dict(first.state_dict())
    assert second.skipped == 1
    assert not second.permits(4, 2.5, 1.0)


def test_a_factor_that_calls_every_loss_a_jump_is_refused() -> None:
    with pytest.raises(ConfigError, match="spike_factor"):
        GuardConfig(spike_factor=1.0)
