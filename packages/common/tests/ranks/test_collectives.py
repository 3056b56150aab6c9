"""Values and gradients of a column-then-row-parallel product against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from slimtron_common.parallel.collectives import (
    copy_to_group,
    gather_from_group,
    max_over_group,
    sum_over_group,
)
from slimtron_common.testing import run_ranks


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 6), (8, 6), (6, 8))
    )


def _loss(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return ((x @ up.T).tanh() @ down.T).square().sum() + (x @ up.T).exp().sum().log()


def _on_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    x, up, down = _inputs()
    up, down = up.chunk(world_size, 0)[rank].clone(), down.chunk(world_size, 1)[rank].clone()
    for tensor in (x, up, down):
        tensor.requires_grad_()
    hidden = copy_to_group(x, group) @ up.T
    output = sum_over_group(hidden.tanh() @ down.T, group)
    whole = gather_from_group(hidden, group, dim=-1)
    loss = output.square().sum() + whole.exp().sum().log()
    loss.backward()
    assert max_over_group(torch.tensor(float(rank)), group) == world_size - 1
    return {"loss": loss.detach(), "x": x.grad, "up": up.grad, "down": down.grad}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_are_those_of_one_process(world_size: int) -> None:
    x, up, down = (tensor.requires_grad_() for tensor in _inputs())
    loss = _loss(x, up, down)
    loss.backward()
    results = run_ranks(_on_rank, world_size)
    for result in results:
        torch.testing.assert_close(result["loss"], loss.detach())
        torch.testing.assert_close(result["x"], x.grad)
    torch.testing.assert_close(torch.cat([r["up"] for r in results], 0), up.grad)
    torch.testing.assert_close(torch.cat([r["down"] for r in results], 1), down.grad)


def test_without_a_group_nothing_happens() -> None:
    tensor = torch.ones(2)
    assert sum_over_group(tensor, None) is tensor
    assert copy_to_group(tensor, None) is tensor
    assert gather_from_group(tensor, None, dim=0) is tensor
