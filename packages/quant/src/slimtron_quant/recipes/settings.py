"""What a ModelOpt config does to one linear layer, read off its entries without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from slimtron_common.integrations.modelopt import QuantConfig, QuantizerEntry

__all__ = ["Attributes", "LinearSettings", "linear_settings", "method_of", "quantizer_settings"]

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LinearSettings:
    """The quantizers of a linear layer; each a sequence, empty where it is off."""

    weight: tuple[Attributes, ...]
    inputs: tuple[Attributes, ...]

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code; 16 where it is not quantized."""
        return min(map(_bits, self.weight), default=16)

    @property
    def activation_bits(self) -> int:
        """Bits of an activation's code; 16 where it is not quantized."""
        return min(map(_bits, self.inputs), default=16)

    @property
    def in_blocks(self) -> set[int]:
        """Sizes of the blocks along the input channels."""
        sizes = ((item.get("block_sizes") or {}).get(-1) for item in (*self.weight, *self.inputs))
        return {size for size in sizes if size is not None}

    @property
    def needs_calibration(self) -> bool:
        """Whether the inputs have a scale that is found beforehand."""
        return any(_is_static(attributes) for attributes in self.inputs)

    @property
    def needs_maxima(self) -> bool:
        """Whether anything has a scale that is found beforehand."""
        return any(_is_static(attributes) for attributes in (*self.weight, *self.inputs))

    @property
    def needs_cuda(self) -> bool:
        """Whether ModelOpt has only a CUDA kernel for it: blocks whose scales are rounded."""
        return any(
            (attributes.get("block_sizes") or {}).get("scale_bits") is not None
            for attributes in (*self.weight, *self.inputs)
        )


def linear_settings(config: QuantConfig, module: str) -> LinearSettings:
    """Returns what ``config`` does to the linear layer ``module``."""
    return LinearSettings(
        quantizer_settings(config.entries, f"{module}.weight_quantizer"),
        quantizer_settings(config.entries, f"{module}.input_quantizer"),
    )


def quantizer_settings(
    entries: tuple[QuantizerEntry, ...], quantizer: str
) -> tuple[Attributes, ...]:
    """Returns the attributes of one quantizer by its name, empty where it is off.

    Entries for modules of some class are about convolutions, norms and embeddings.
    """
    attributes: tuple[Attributes, ...] = ({},)
    enabled = False
    for entry in entries:
        if entry.parent_class is not None or not fnmatchcase(quantizer, entry.pattern):
            continue
        if entry.attributes is not None:
            several = isinstance(entry.attributes, tuple)
            attributes = entry.attributes if several else (entry.attributes,)  # type: ignore[assignment]
        enabled = entry.enable is not False
    return attributes if enabled else ()


def method_of(config: QuantConfig) -> str | None:
    """Returns the name of the algorithm that calibrates; None for none."""
    algorithm = config.algorithm
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    return None if method is None else str(method)


def _bits(attributes: Attributes) -> int:
    bits = attributes.get("num_bits", 8)
    return bits if isinstance(bits, int) else 1 + sum(bits)


def _is_static(attributes: Attributes) -> bool:
    blocks = attributes.get("block_sizes") or {}
    # Microscaling formats have no scale but that of their blocks, found as it runs.
    microscaling = blocks.get("type") == "dynamic" and blocks.get("scale_bits") == (8, 0)
    return attributes.get("type") != "dynamic" and not microscaling
