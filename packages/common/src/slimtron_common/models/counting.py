"""How many parameters a model has, and where."""

from __future__ import annotations

import math
from collections import Counter

from slimtron_common.models.architecture import Architecture
from slimtron_common.models.mapping import model_parameters

__all__ = ["count_parameters"]

_COMPONENTS = {
    "embedding": "embedding",
    "self_attention": "attention",
    "mixer": "mamba",
    "experts": "experts",
    "router": "router",
    "shared_experts": "shared expert",
    "mlp": "mlp",
    "output_layer": "output",
}
"""By what Megatron-Core's names have in them."""


def count_parameters(architecture: Architecture) -> dict[str, int]:
    """Counts parameters by component, a tied output layer once.

    Returns:
        Of embedding, attention, mamba, mlp (or router, experts and shared expert), norms and
        output, those that the model has.
    """
    counts: Counter[str] = Counter()
    for _, rule in model_parameters(architecture):
        counts[_component(rule.names[0])] += sum(map(math.prod, rule.hf_shapes))
    return dict(counts)


def _component(name: str) -> str:
    if "norm" in name:
        return "norms"
    return next(component for part, component in _COMPONENTS.items() if part in name.split("."))
