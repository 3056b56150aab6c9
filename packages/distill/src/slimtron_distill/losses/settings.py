"""What a loss between logits computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from slimtron_common.errors import ConfigError

__all__ = ["Implementation", "LogitLossSettings"]

Implementation = Literal["auto", "triton", "torch"]
"""``auto`` takes Triton for CUDA tensors and torch for others."""

_KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitLossSettings:
    """The divergence of the student's next-token distribution from the teacher's.

    With ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``, of one token and in nats:

    - ``forward_kl``: ``T^2 KL(p || q)``
    - ``reverse_kl``: ``T^2 KL(q || p)``
    - ``jsd``: ``T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`` with ``m = beta p + (1 - beta) q``,
      the generalized Jensen-Shannon divergence of Agarwal et al. 2023 (arXiv:2306.13649)

    The factor ``T^2`` keeps the size of the gradient when the temperature changes (Hinton et al.
    2015, arXiv:1503.02531).
    """

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence."""

    beta: float = 0.5
    """Weight of the teacher in ``jsd``, from 0 to 1. At the ends, where the divergence itself is
    0, stand its limits per unit of weight: 0 is ``forward_kl``, 1 is ``reverse_kl``."""

    temperature: float = 1.0
    """``T``, what the logits are divided by."""

    top_k: int | None = None
    """Entries of the vocabulary that count: those with the largest teacher logits. Student and
    teacher are both renormalized over them. None counts all."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(
                "unknown divergence", where="kind", found=self.kind, allowed=", ".join(_KINDS)
            )
        if not 0 <= self.beta <= 1:
            raise ConfigError("out of range", where="beta", found=self.beta, allowed="0 to 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                "out of range", where="temperature", found=self.temperature, allowed="above 0"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                "out of range", where="top_k", found=self.top_k, allowed="at least 1, or none"
            )

    @property
    def divergence(self) -> Literal["forward_kl", "reverse_kl", "jsd"]:
        """The kind, with the ends of ``jsd`` resolved."""
        if self.kind == "jsd" and self.beta in (0, 1):
            return "reverse_kl" if self.beta else "forward_kl"
        return self.kind
