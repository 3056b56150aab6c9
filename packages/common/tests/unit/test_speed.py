from __future__ import annotations

import pytest
import torch

from slimtron_common.speed import measured_flops, show_duration


def test_a_machine_has_a_speed() -> None:
    assert 1e6 < measured_flops("cpu", torch.float32) < 1e15


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12 s"), (120, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text
