"""What a mixed-precision job is asked for. Light to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from slimtron_common.errors import ConfigError
from slimtron_quant.recipes.table import check_recipe_name, is_file

__all__ = ["UNQUANTIZED", "MixedPrecisionConfig"]

UNQUANTIZED = "none"
"""The candidate that leaves a layer as it is."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPrecisionConfig:
    """A budget, and the formats that may be chosen from to meet it. Without a budget, nothing."""

    bits: float | None = None
    """Stored bits for each weight of the decoder's linear layers, their scales and factors
    included, over all of those layers: quantized, left as they are, and excluded ones.
    Embedding, output layer, norms, routers and biases do not count."""

    size: str | None = None
    """Instead of ``bits``: size of all weight files, such as 80MB or 1.5GiB, everything
    included."""

    candidates: tuple[str, ...] = ("int4_awq", "fp8", UNQUANTIZED)
    """Names of recipes, ``modelopt:NAME`` among them, and ``none`` to leave layers as they are.
    One at most may be a recipe that searches (``int8_sq`` and those with AWQ)."""

    sensitivity: Path | None = None
    """A ``sensitivity.json`` that an earlier run on the same model, text and candidates left, to
    choose from without measuring again."""

    sensitivity_tokens: int = 2048
    """Tokens to measure sensitivity on: the first whole sequences of the calibration's text, or
    all of it if that is shorter. Every group of layers takes a pass over them for every
    candidate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if self.bits is not None and self.size is not None:
            raise ConfigError(
                "give one budget, not two",
                where="bits",
                found=f"{self.bits} bits and {self.size}",
                allowed="bits or size",
            )
        if self.bits is not None and not self.bits > 0:
            raise ConfigError("out of range", where="bits", found=self.bits, allowed="above 0")
        if self.size is not None:
            _num_bytes(self.size)
        if len(set(self.candidates)) != len(self.candidates) or len(self.candidates) < 2:
            raise ConfigError(
                "there is nothing to choose between",
                where="candidates",
                found=", ".join(self.candidates) or "no recipe",
                allowed="two different ones or more",
            )
        for name in self.candidates:
            if name != UNQUANTIZED:
                check_recipe_name(name, where="candidates")
            if is_file(name):
                raise ConfigError(
                    "a file cannot be a candidate",
                    where="candidates",
                    found=name,
                    allowed=f"a recipe's name, modelopt:NAME, {UNQUANTIZED}",
                )
        if self.sensitivity_tokens < 1:
            raise ConfigError(
                "counts tokens",
                where="sensitivity_tokens",
                found=self.sensitivity_tokens,
                allowed="1 or more",
            )
        if self.sensitivity is not None and not self.is_on:
            raise ConfigError(
                "without a budget there is nothing to choose",
                where="sensitivity",
                found=self.sensitivity,
                hint="say --bits or --size",
            )

    @property
    def is_on(self) -> bool:
        """Whether there is a budget."""
        return self.bits is not None or self.size is not None

    @property
    def num_bytes(self) -> int | None:
        """``size`` as a number."""
        return None if self.size is None else _num_bytes(self.size)

    @property
    def budget(self) -> str:
        """The budget for people."""
        return f"{self.bits:g} bits a weight" if self.bits is not None else str(self.size)


def _num_bytes(size: str) -> int:
    match = _SIZE.fullmatch(size.strip())
    if match is None or not float(match[1]):
        raise ConfigError(
            "is not a size",
            where="size",
            found=size,
            allowed="such as 80MB (10^6 bytes) or 1.5GiB (2^30)",
        )
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
