"""Which activations the backward pass computes again, in Megatron-Core's terms."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["RECOMPUTE"]

RECOMPUTE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
)
"""Fields of ``TransformerConfig`` by the value of ``TrainingConfig.recompute``."""
