"""How small a model has to become, and among which shapes to look."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from slimtron_common.errors import ConfigError

__all__ = ["DIMENSIONS", "SearchConfig", "parse_size"]

DIMENSIONS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
)
"""What a search varies; bounds go by these names."""

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "G": 10**9,
    "T": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """A budget, and how to look for the best shape within it; without one nothing is searched."""

    target_params: int | str | None = None
    """Most parameters, a tied output layer counted once: ``100M``."""

    target_memory: int | str | None = None
    """Most bytes of weights and KV cache: ``1GiB``."""

    target_ratio: float | None = None
    """Most parameters as a share of the model's: 0.75."""

    memory_batch_size: int = 1
    """Sequences whose KV cache counts as memory."""

    memory_seq_length: int = 4096
    """Tokens in each of them."""

    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    """Smallest and largest size of a dimension, by its name. Without one it is from half of the
    model's size to all of it."""

    num_candidates: int = 8
    """Shapes that are cut and measured, the most promising of all that fit."""

    num_tokens: int = 2048
    """Tokens of the scoring text to measure each of them on."""

    def __post_init__(self) -> None:
        budgets = [n for n in ("target_params", "target_memory", "target_ratio") if self._has(n)]
        if len(budgets) > 1:
            raise ConfigError("one budget is enough", where=budgets[1], found=" and ".join(budgets))
        for name in ("target_params", "target_memory"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_size(value, where=name))
        if self.target_ratio is not None and not 0 < self.target_ratio < 1:
            raise ConfigError(
                "is no share of the model",
                where="target_ratio",
                found=self.target_ratio,
                allowed="above 0 and below 1",
            )
        counts = ("memory_batch_size", "memory_seq_length", "num_candidates", "num_tokens")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(
                    "is too small", where=name, found=getattr(self, name), allowed="1 or more"
                )
        for name, (low, high) in self.bounds.items():
            where = f"bounds.{name}"
            if name not in DIMENSIONS:
                raise ConfigError(
                    "is no dimension", where=where, found=name, allowed=", ".join(DIMENSIONS)
                )
            if not 1 <= low <= high:
                raise ConfigError(
                    "are no bounds", where=where, found=[low, high], allowed="1 <= low <= high"
                )

    @property
    def has_budget(self) -> bool:
        """Whether there is anything to search for."""
        return any(map(self._has, ("target_params", "target_memory", "target_ratio")))

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


def parse_size(value: int | str, *, where: str) -> int:
    """Reads ``100M``, ``1.5GiB`` or a number.

    Raises:
        ConfigError: It is none of these.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = 0 if match is None or unit is None else round(float(match[1]) * unit)
    if size < 1:
        raise ConfigError("is no size", where=where, found=value, allowed="such as 100M or 1GiB")
    return size
