"""Updates that must not reach the weights."""

from __future__ import annotations

import logging
import math
import statistics
from typing import Any

from slimtron_common.errors import SlimtronError
from slimtron_distill.training.config import GuardConfig

__all__ = ["Guard", "UnstableTrainingError"]

logger = logging.getLogger(__name__)


class UnstableTrainingError(SlimtronError):
    """The loss or the gradient is not finite, or the loss jumped."""


class Guard:
    """Judges each update before it is made. All processes judge the same numbers alike.

    Args:
        config: What counts as bad, and what is done about it.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = 0
        """Updates that were left out so far."""
        self._losses: list[float] = []

    def permits(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether an update may be made.

        Args:
            step: Its number, for messages.
            loss: Mean over the tokens of the global batch.
            grad_norm: Of the whole model's gradient.

        Raises:
            UnstableTrainingError: It may not, and the run is to stop.
        """
        reason = self._objection(loss, grad_norm)
        if reason is None:
            self._losses = [*self._losses, loss][-self.config.window :]
            return True
        if self.config.action == "stop":
            raise UnstableTrainingError(
                "the training is not stable",
                where=f"step {step}",
                found=reason,
                hint="lower optimizer.lr or raise optimizer.warmup_steps; or leave such updates "
                "out with guard.action=skip",
            )
        self.skipped += 1
        logger.warning("step %d is left out (%d so far): %s", step, self.skipped, reason)
        if self.skipped > self.config.max_skipped:
            raise UnstableTrainingError(
                "too many updates were left out",
                where=f"step {step}",
                found=f"{self.skipped}, the last because of {reason}",
                allowed=f"guard.max_skipped {self.config.max_skipped}",
                hint="lower optimizer.lr or raise optimizer.warmup_steps",
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"skipped": self.skipped, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state of an earlier run."""
        self.skipped, self._losses = state["skipped"], state["losses"]

    def _objection(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        factor = self.config.spike_factor
        if factor is not None and len(self._losses) == self.config.window:
            usual = statistics.median(self._losses)
            if loss > factor * usual:
                return f"the loss is {loss:.4g}, of late it was {usual:.4g}"
        return None
