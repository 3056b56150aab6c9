"""Hidden states of two models in one tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimtron_distill.model.packing import Packing

TP, S, B = 4, 16, 3


def _config(width: int, cut: bool) -> Any:
    return SimpleNamespace(hidden_size=width, sequence_parallel=cut, tensor_model_parallel_size=TP)


@pytest.mark.parametrize("student_cut", [False, True])
@pytest.mark.parametrize("teacher_cut", [False, True])
def test_what_is_packed_comes_out(student_cut: bool, teacher_cut: bool) -> None:
    packing = Packing.of(_config(6, student_cut), _config(10, teacher_cut))
    rows = [S // TP if cut else S for cut in (student_cut, teacher_cut)]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows[0], B, 6, generator=generator, requires_grad=True)
    teacher = torch.randn(rows[1], B, 10, generator=generator)
    packed = packing.pack(student, teacher)
    # As the schedules would make it out of a config.
    assert packed.shape == packing.adjust(student.shape) == (min(rows), B, packing.width)
    # The schedule frees it once it is sent, which it refuses for views.
    assert packed._base is None

    received = packed.detach().clone().requires_grad_()
    ours, theirs = packing.unpack(received)
    assert torch.equal(ours, student)
    assert torch.equal(theirs, teacher)
    assert not theirs.requires_grad
    assert all(x.is_contiguous() and x._base is not None for x in (ours, theirs))

    slope = torch.randn(student.shape, generator=generator)
    (ours * slope).sum().backward()
    packed.backward(received.grad)
    torch.testing.assert_close(student.grad, slope, rtol=0, atol=0)


def test_one_layout_puts_the_widths_side_by_side() -> None:
    packing = Packing.of(_config(6, False), _config(10, False))
    assert packing.adjust((S, B, 6)) == (S, B, 16)
