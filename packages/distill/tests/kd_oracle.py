"""The distillation loss in float64 by its definition, and logits to try it on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimtron_distill.losses import LogitLossSettings

SETTINGS = (
    LogitLossSettings(),
    LogitLossSettings(kind="forward_kl", temperature=2.3),
    LogitLossSettings(kind="reverse_kl"),
    LogitLossSettings(kind="reverse_kl", temperature=0.7),
    LogitLossSettings(kind="jsd", beta=0.5),
    LogitLossSettings(kind="jsd", beta=0.1, temperature=1.7),
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""For gradients. Rounding alone costs bf16 1.7e-3 on average, and 3.9e-3 at worst."""

_IMPOSSIBLE = -1e30


def oracle(
    student: Tensor, teacher: Tensor, settings: LogitLossSettings, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, by autograd; weights of 0 and ``-inf`` as documented."""
    s = student.detach().double()
    t = teacher.detach().double()
    kind = settings.divergence
    if kind == "forward_kl":
        t = t.masked_fill(s == -torch.inf, -torch.inf)
    elif kind == "reverse_kl":
        s = s.masked_fill(t == -torch.inf, -torch.inf)
    kept = weights.double() != 0
    kept &= (s != -torch.inf).any(-1) & (t != -torch.inf).any(-1)
    # Finite, so that autograd meets no inf - inf; its exponential is 0 all the same.
    s, t = (x.masked_fill(x == -torch.inf, _IMPOSSIBLE) for x in (s, t))
    s.requires_grad_()
    log_q = _log_softmax(s[kept] / settings.temperature)
    log_p = _log_softmax(t[kept] / settings.temperature)
    if kind == "forward_kl":
        loss = _kl(log_p, log_q)
    elif kind == "reverse_kl":
        loss = _kl(log_q, log_p)
    else:
        beta = settings.beta
        log_m = torch.logaddexp(log_p + _log(beta), log_q + _log(1 - beta))
        loss = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    total = (loss * weights.double()[kept]).sum() * settings.temperature**2
    (gradient,) = torch.autograd.grad(total, s)
    return total.detach(), gradient


def gradient_error(
    gradient: Tensor,
    exact: Tensor,
    student: Tensor,
    teacher: Tensor,
    settings: LogitLossSettings,
    weights: Tensor,
) -> float:
    """Error relative to the gradient, or to a tenth of the terms whose difference it is.

    Where student and teacher agree, or the student is all but certain, the difference is smaller
    than the rounding of the terms.
    """
    s, t = (x.detach().double() / settings.temperature for x in (student, teacher))
    terms = s.softmax(-1).nan_to_num(0.0)
    if settings.divergence == "reverse_kl":
        gap = (s - s.amax(-1, keepdim=True)) - (t - t.amax(-1, keepdim=True))
        terms = terms * gap.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=1.0)
    scale = 0.1 * (terms * (weights.double() * settings.temperature).unsqueeze(-1)).norm()
    return float((gradient.double() - exact).norm() / torch.maximum(exact.norm(), scale))


def loss_error(loss: Tensor, exact: Tensor, weights: Tensor) -> float:
    """Error relative to the loss, or to a tenth of a nat for each token where it is smaller."""
    floor = 0.1 * float(weights.double().abs().sum())
    return abs(loss.item() - exact.item()) / max(abs(exact.item()), floor, 1e-300)


def _normal(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape) * 2, torch.randn(shape) * 2


def _huge(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape) * 3000, torch.randn(shape) * 3000


def _offset(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(shape) + 1000, torch.randn(shape) - 1000


def _equal(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    logits = torch.randn(shape) * 3
    return logits, logits.clone()


def _constant(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.full(shape, 7.0), torch.full(shape, -3.0)


def _one_hot(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    student, teacher = torch.zeros(shape), torch.zeros(shape)
    for logits in (student, teacher):
        logits.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1)), 30.0)
    return student, teacher


def _impossible(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``-inf`` in the student, in the teacher, in both, and in all of a token."""
    student, teacher = _normal(shape)
    student[torch.rand(shape) < 0.3] = -torch.inf
    teacher[torch.rand(shape) < 0.3] = -torch.inf
    student.flatten(0, -2)[0] = -torch.inf
    teacher.flatten(0, -2)[1] = -torch.inf
    return student, teacher


LOGITS: dict[str, Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]] = {
    "normal": _normal,
    "huge": _huge,
    "offset": _offset,
    "equal": _equal,
    "constant": _constant,
    "one_hot": _one_hot,
    "impossible": _impossible,
}


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


def _log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(-1, keepdim=True)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    gap = torch.where(p == 0, 0.0, log_p) - torch.where(p == 0, 0.0, log_q)
    return (p * gap).sum(-1)
