"""What every process of a tensor-parallel group checks about the losses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from packages.distill.tests.kd_oracle import (
    LOGITS,
    SETTINGS,
    TOLERANCE,
    gradient_error,
    loss_error,
    oracle,
)
from torch import Tensor

from slimtron_common.errors import ParallelismError
from slimtron_distill.losses import (
    LogitLossSettings,
    kd_loss,
    kd_loss_from_top_k,
    linear_kd_loss,
    teacher_top_k,
)


def check_vocab_parallel(rank: int, world_size: int, device: str) -> None:
    """Losses over a cut vocabulary are those over the whole, and so are their gradients.

    Args:
        rank: This process's.
        world_size: How many cut the vocabulary.
        device: Of the logits; all processes may share one GPU.
    """
    group = dist.group.WORLD
    seed = torch.tensor(torch.seed() % 2**31)
    dist.broadcast(seed, 0)
    torch.manual_seed(int(seed))
    _check_values(rank, world_size, device, group)
    _check_top_k(rank, world_size, device, group)
    _check_linear(rank, world_size, device, group)
    with pytest.raises(ParallelismError, match="different parts"):
        kd_loss(torch.zeros(2, 8), torch.zeros(2, 9), LogitLossSettings(), group=group)


def _check_values(rank: int, size: int, device: str, group: dist.ProcessGroup) -> None:
    width = 96 // size
    # The last process holds an entry and padding, or padding alone.
    vocab_size = 96 - width + 1 if size == 2 else 96 - width
    for dtype in (torch.float32, torch.bfloat16):
        for settings in SETTINGS:
            for name, make in LOGITS.items():
                student, teacher = (x.to(device, dtype) for x in make((6, 2, 96)))
                weights = torch.rand(6, 2, device=device)
                weights[-1] = 0
                kept = slice(vocab_size)
                exact, exact_gradient = oracle(
                    student[..., kept], teacher[..., kept], settings, weights
                )
                own = slice(rank * width, (rank + 1) * width)
                logits = student[..., own].clone().requires_grad_()
                loss = kd_loss(
                    logits,
                    teacher[..., own],
                    settings,
                    weights=weights,
                    group=group,
                    vocab_size=vocab_size,
                )
                loss.backward()
                assert logits.grad is not None
                assert loss_error(loss, exact, weights) <= 2e-6, (name, settings)
                gradient = _whole(logits.grad, group)
                assert not gradient[..., vocab_size:].any()
                error = gradient_error(
                    *(gradient[..., kept], exact_gradient),
                    *(student[..., kept], teacher[..., kept], settings, weights),
                )
                # Rounding to bf16 costs up to 2**-8 of so few numbers.
                limit = 4e-3 if dtype == torch.bfloat16 else TOLERANCE[dtype]
                assert error <= limit, (name, dtype, settings, error)


def _check_top_k(rank: int, size: int, device: str, group: dist.ProcessGroup) -> None:
    width = 48 // size
    student = torch.randn(5, 2, 48, device=device)
    teacher = torch.randint(-4, 4, (5, 2, 48), device=device).bfloat16()
    own = slice(rank * width, (rank + 1) * width)
    for k in (1, 7, 40):
        chosen = teacher_top_k(teacher, k, vocab_size=45)
        cut = teacher_top_k(teacher[..., own], k, group=group, vocab_size=45)
        assert all(map(torch.equal, chosen, cut))
        settings = LogitLossSettings(kind="reverse_kl", top_k=k)
        whole, shard = (x.clone().requires_grad_() for x in (student, student[..., own]))
        loss = kd_loss(whole, teacher, settings, vocab_size=45)
        shard_loss = kd_loss(shard, teacher[..., own], settings, group=group, vocab_size=45)
        (loss * 2).backward()
        (shard_loss * 2).backward()
        cached = kd_loss_from_top_k(shard, *cut, settings, group=group, vocab_size=45)
        assert torch.equal(shard_loss, cached)
        torch.testing.assert_close(shard_loss, loss)
        torch.testing.assert_close(shard.grad, whole.grad[..., own])


def _check_linear(rank: int, size: int, device: str, group: dist.ProcessGroup) -> None:
    width = 48 // size
    hidden, head = torch.randn(300, 2, 16, device=device), torch.randn(48, 16, device=device)
    teacher = torch.randn(300, 2, 24, device=device), torch.randn(48, 24, device=device)
    weights = torch.rand(300, 2, device=device)
    settings = LogitLossSettings(kind="jsd", temperature=2.0)
    own = slice(rank * width, (rank + 1) * width)
    whole_hidden, whole_head = (x.clone().requires_grad_() for x in (hidden, head))
    loss = kd_loss(
        whole_hidden @ whole_head.t(), teacher[0] @ teacher[1].t(), settings, weights=weights
    )
    loss.backward()
    for sequence_parallel in (False, True):
        tokens = slice(rank * 300 // size, (rank + 1) * 300 // size)
        if not sequence_parallel:
            tokens = slice(300)
        own_hidden, own_head = hidden[tokens].clone(), head[own].clone()
        own_hidden.requires_grad_()
        own_head.requires_grad_()
        own_loss = linear_kd_loss(
            own_hidden,
            own_head,
            teacher[0][tokens],
            teacher[1][own],
            settings,
            weights=weights,
            group=group,
            sequence_parallel=sequence_parallel,
            logit_bytes=1,
        )
        own_loss.backward()
        torch.testing.assert_close(own_loss, loss.detach())
        torch.testing.assert_close(own_hidden.grad, whole_hidden.grad[tokens], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own_head.grad, whole_head.grad[own], rtol=1e-4, atol=1e-4)


def _whole(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(shard.contiguous()) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, -1)
