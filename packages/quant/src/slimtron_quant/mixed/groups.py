"""The layers that must be given one format together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slimtron_common.models.linear import LinearLayer

__all__ = ["FormatGroup", "format_groups"]


@dataclass(frozen=True, slots=True)
class FormatGroup:
    """Linear layers that share a format.

    Queries, keys and values, and gate and up projection, are one linear layer in Megatron-Core.
    Beyond these, inference engines compute all experts of a layer, both of their projections, by
    one fused kernel of one format.
    """

    name: str
    """The module's name, or that of the parent of all experts: as a pattern it matches the
    members."""

    layer: int
    kind: str
    """The name inside the layer: ``mlp.linear_fc1``, or ``mlp.experts``."""

    members: tuple[str, ...]
    """Names of the modules in the whole model."""


def format_groups(layers: Iterable[LinearLayer]) -> list[FormatGroup]:
    """Collects linear layers into groups, in the order of the model."""
    members: dict[tuple[int, str], list[str]] = {}
    for layer in layers:
        kind = layer.kind if layer.expert is None else layer.kind.rpartition(".")[0]
        members.setdefault((layer.layer, kind), []).append(layer.name)
    return [
        FormatGroup(f"decoder.layers.{layer}.{kind}", layer, kind, tuple(names))
        for (layer, kind), names in members.items()
    ]
