"""The scan of a Mamba layer against its recurrence, token by token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimtron_common.integrations.mamba_scan import gated_rms_norm, split_conv_scan

HEADS, WIDTH, GROUPS, STATES, LENGTH = 4, 3, 2, 5, 23
INNER = HEADS * WIDTH
CONVOLVED = INNER + 2 * GROUPS * STATES


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "projected": (2, LENGTH, INNER + CONVOLVED + HEADS),
        "conv_weight": (CONVOLVED, 4),
        "conv_bias": (CONVOLVED,),
        "dt_bias": (HEADS,),
        "decay": (HEADS,),
        "skip": (HEADS,),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "decay": -made["decay"].exp()}


def recurrence(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    decay: Tensor,
    skip: Tensor,
) -> Tensor:
    gate, mixed, steps = torch.split(projected, [INNER, CONVOLVED, HEADS], -1)
    rows = []
    for row in range(len(projected)):
        state = projected.new_zeros(HEADS, WIDTH, STATES)
        outputs = []
        for t in range(LENGTH):
            window = projected.new_zeros(CONVOLVED, 4)
            for back in range(min(t + 1, 4)):
                window[:, 3 - back] = mixed[row, t - back]
            seen = F.silu((window * conv_weight).sum(1) + conv_bias)
            x, b, c = torch.split(seen, [INNER, GROUPS * STATES, GROUPS * STATES])
            output = projected.new_empty(HEADS, WIDTH)
            for head in range(HEADS):
                write, read = (v.view(GROUPS, STATES)[head * GROUPS // HEADS] for v in (b, c))
                value = x.view(HEADS, WIDTH)[head]
                step = F.softplus(steps[row, t, head] + dt_bias[head])
                kept = (step * decay[head]).exp() * state[head]
                state[head] = kept + step * value[:, None] * write[None]
                output[head] = state[head] @ read + skip[head] * value
            outputs.append(output.flatten() * F.silu(gate[row, t]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [1, 8, 23, 128])
def test_chunks_compute_the_recurrence(chunk_size: int) -> None:
    sizes = {"num_groups": GROUPS, "head_dim": WIDTH, "chunk_size": chunk_size}
    found = split_conv_scan(**inputs(), **sizes)  # type: ignore[arg-type]
    expected = recurrence(**{name: value.double() for name, value in inputs().items()})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_forgets_at_once_stays_finite_and_has_gradients() -> None:
    made = inputs()
    made["decay"] *= 1e4
    projected = made["projected"].requires_grad_()
    sizes = {"num_groups": GROUPS, "head_dim": WIDTH, "chunk_size": 16}
    found = split_conv_scan(**made, **sizes)  # type: ignore[arg-type]
    found.sum().backward()
    assert bool(found.isfinite().all())
    assert projected.grad is not None
    assert bool(projected.grad.isfinite().all())


def test_each_group_has_a_root_mean_square_of_its_own() -> None:
    x, weight = torch.randn(3, 8).double(), torch.randn(8).double()
    rms = (x.view(3, 2, 4).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (x.view(3, 2, 4) / rms).view(3, 8) * weight
    torch.testing.assert_close(
        gated_rms_norm(x.float(), weight, 4, 1e-5).double(), expected, rtol=1e-5, atol=1e-5
    )
