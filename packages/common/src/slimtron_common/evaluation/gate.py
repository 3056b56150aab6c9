"""How much worse than its original a model may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from slimtron_common.errors import ConfigError

__all__ = ["QualityGate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityGate:
    """Limits that a delivered model is held to; without any, every model passes.

    A model that misses one is delivered all the same, and the command ends with exit code 3.
    """

    max_perplexity_increase: float | str | None = None
    """Largest increase of the perplexity relative to the original's: ``0.05``, or ``5%``."""

    min_agreement: float | str | None = None
    """Smallest share of tokens for which the most likely token is the original's: ``0.9``, or
    ``90%``."""

    def __post_init__(self) -> None:
        for name, highest in (("max_perplexity_increase", math.inf), ("min_agreement", 1.0)):
            limit = getattr(self, name)
            if limit is not None:
                object.__setattr__(self, name, _fraction(name, limit, highest))

    def misses(
        self,
        original: Mapping[str, float | int | None],
        delivered: Mapping[str, float | int | None],
    ) -> list[str]:
        """Holds a model's metrics to the limits.

        Args:
            original: The original's ``perplexity``.
            delivered: The model's ``perplexity`` and ``agreement``. What was not measured, or
                is not a number, misses.

        Returns:
            A sentence for each limit that was missed.
        """
        missed = []
        if self.max_perplexity_increase is not None:
            limit = float(self.max_perplexity_increase)
            before, after = _number(original["perplexity"]), _number(delivered["perplexity"])
            if not after <= before * (1 + limit):
                missed.append(
                    f"perplexity rose by {after / before - 1:.2%}, allowed are {limit:.2%}"
                )
        if self.min_agreement is not None:
            limit, agreement = float(self.min_agreement), _number(delivered["agreement"])
            if not agreement >= limit:
                missed.append(f"{agreement:.2%} of the tokens agree, wanted are {limit:.2%}")
        return missed

    def verdict(
        self,
        original: Mapping[str, float | int | None],
        delivered: Mapping[str, float | int | None],
    ) -> str | None:
        """Says in a report's words whether a model passed; None without limits."""
        if self == QualityGate():
            return None
        missed = self.misses(original, delivered)
        return "missed: " + "; ".join(missed) if missed else "passed"


def _fraction(name: str, value: float | str, highest: float) -> float:
    text = str(value).strip()
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = math.nan
    if isinstance(value, bool) or not 0 <= found <= highest or math.isinf(found):
        raise ConfigError(
            "not a share",
            where=name,
            found=repr(value),
            allowed="0.05 or 5%, " + ("at most 1 or 100%" if highest == 1 else "0 or more"),
        )
    return found


def _number(value: float | int | None) -> float:
    return math.nan if value is None else float(value)
