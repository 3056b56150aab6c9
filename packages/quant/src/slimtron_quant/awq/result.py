"""What the search chose, and what it could have chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["AWQResult", "LayerScale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScale:
    """The choice of scale for one linear layer."""

    alpha: float | None
    """Exponent of the activations' magnitude in the scale; None where no scale is best."""

    losses: tuple[float, ...]
    """Squared error of the layer's output, summed over output channels, mean over tokens: for
    each of ``AWQResult.alphas``."""

    signal: float
    """Square of the layer's output before quantization, summed and averaged like the losses."""

    num_tokens: int
    """Tokens that the layer saw, over all processes."""

    @property
    def relative_error(self) -> float:
        """Squared error over squared output with the chosen scale; 0 for a layer without signal."""
        return min(self.losses) / self.signal if self.signal else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AWQResult:
    """The choices for all layers of this process's pipeline stage."""

    alphas: tuple[float | None, ...]
    """The candidates, in the order of ``LayerScale.losses``; None is the weight unscaled."""

    layers: dict[str, LayerScale]
    """By module name, local to the pipeline stage; equal on its tensor- and data-parallel
    processes."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)
