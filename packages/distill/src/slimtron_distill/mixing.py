"""How the losses add up to the one that is minimized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimtron_distill.config import DistillationConfig

__all__ = ["INTERMEDIATE", "LM", "LOGITS", "TOTAL", "LossMixer", "LossWeights"]

LM, LOGITS, INTERMEDIATE, TOTAL = "lm_loss", "logits_loss", "intermediate_loss", "loss"
"""Names of the losses in logs: each as it is, unweighted, but for the total."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Factors of the losses in the total, constants for the gradient."""

    lm: float
    logits: float
    intermediate: float

    def total(self, losses: Mapping[str, float]) -> float:
        """The total of the losses' means; an absent loss counts 0."""
        return (
            self.lm * losses.get(LM, 0.0)
            + self.logits * losses.get(LOGITS, 0.0)
            + self.intermediate * losses.get(INTERMEDIATE, 0.0)
        )


class LossMixer:
    """The weights of one step after another.

    Dynamic factors are made of the means of the whole batch of the step before. They are so the
    same on all processes without communication, do not depend on how the batch was cut, and
    stay within bounds where a loss comes near zero. The first step's are 1.
    """

    def __init__(self, config: DistillationConfig) -> None:
        self._config = config
        self._kd_factor = self._intermediate_factor = 1.0

    @property
    def weights(self) -> LossWeights:
        """Those of the current step."""
        config = self._config
        kd = 1.0 if config.skip_lm_loss else config.kd_loss_scale * self._kd_factor
        return LossWeights(
            lm=0.0 if config.skip_lm_loss else 1.0,
            logits=kd,
            intermediate=kd * config.intermediate_loss_scale * self._intermediate_factor,
        )

    def observe(self, losses: Mapping[str, float]) -> None:
        """Takes the means of the step that is done: the same on every process."""
        if self._config.loss_balancer == "fixed":
            return
        logits, intermediate = losses[LOGITS], losses.get(INTERMEDIATE, 0.0)
        self._intermediate_factor = self._bounded(logits, intermediate)
        kd = (
            logits + self._config.intermediate_loss_scale * self._intermediate_factor * intermediate
        )
        self._kd_factor = self._bounded(losses.get(LM, 0.0), kd)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to go on with the same weights."""
        return {"kd": self._kd_factor, "intermediate": self._intermediate_factor}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes back what ``state_dict`` gave."""
        self._kd_factor, self._intermediate_factor = state["kd"], state["intermediate"]

    def _bounded(self, target: float, value: float) -> float:
        """The factor from ``value`` to ``target``; 1 where there is nothing to bring together."""
        limit = self._config.max_dynamic_scale
        # Also where either is NaN: the step is lost, its factors need not be.
        if not (target > 0 and value > 0):
            return 1.0
        return min(max(target / value, 1 / limit), limit)
