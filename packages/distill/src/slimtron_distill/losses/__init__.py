"""Losses between the logits of a student and of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimtron_distill.losses.settings import LogitLossSettings

if TYPE_CHECKING:
    from slimtron_distill.losses.kd import kd_loss
    from slimtron_distill.losses.linear import linear_kd_loss
    from slimtron_distill.losses.top_k import kd_loss_from_top_k, teacher_top_k

__all__ = [
    "LogitLossSettings",
    "kd_loss",
    "kd_loss_from_top_k",
    "linear_kd_loss",
    "teacher_top_k",
]


def __getattr__(name: str) -> Any:
    # Configs hold the settings, and a command's --help must not wait for torch.
    if name in __all__:
        from slimtron_distill.losses import kd, linear, top_k

        return next(getattr(m, name) for m in (kd, linear, top_k) if name in m.__all__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
