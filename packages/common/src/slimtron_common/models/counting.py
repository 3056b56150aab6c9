"""How many parameters a model has, and where."""

from __future__ import annotations

import math
from collections import Counter

from slimtron_common.models.architecture import Architecture
from slimtron_common.models.mapping import model_parameters

__all__ = ["count_parameters"]

_COMPONENTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "experts": "experts",
    "gate": "router",
    "shared_expert": "shared expert",
    "shared_expert_gate": "shared expert",
    "mlp": "mlp",
    "lm_head": "output",
}


def count_parameters(architecture: Architecture) -> dict[str, int]:
    """Counts parameters by component, a tied output layer once.

    Returns:
        Of embedding, attention, mlp (or router, experts and shared expert), norms and output,
        those that the model has.
    """
    counts: Counter[str] = Counter()
    for _, rule in model_parameters(architecture):
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            counts[_component(name)] += math.prod(shape)
    return dict(counts)


def _component(name: str) -> str:
    if "norm" in name:
        return "norms"
    return next(component for part, component in _COMPONENTS.items() if part in name.split("."))
