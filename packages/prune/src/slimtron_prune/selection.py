"""Which layers, heads, channels and experts a smaller model keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import Hybrid
from slimtron_prune.scoring.scores import Scores

__all__ = ["Axis", "Selection", "kept_pattern", "select", "select_layers"]

Axis = Literal[
    "hidden",
    "ffn",
    "shared",
    "queries",
    "key_values",
    "experts",
    "mamba_heads",
    "mamba_inner",
    "mamba_conv",
    "mamba_projection",
]
"""What a dimension of a weight counts; ``queries`` and ``key_values`` count heads' channels.

Of a Mamba layer ``mamba_inner`` counts heads' channels, ``mamba_conv`` those and B and C, and
``mamba_projection`` the gate's channels, what the convolution sees, and a time step for each head.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is kept of a model; indices increase, so that what is kept keeps its order."""

    source: Architecture
    target: Architecture
    layers: tuple[int, ...]
    """The source's layers, from 0."""

    hidden: Tensor | None = None
    """``[h]``, int64; as in all that follow, None keeps all."""

    ffn: Tensor | None = None
    """``[layers, f]``, or ``[layers, experts, f]``, of the source's layers and experts."""

    shared: Tensor | None = None
    """Channels of the expert that serves all tokens ``[layers, f]``."""

    heads: Tensor | None = None
    """Query heads ``[layers, heads]``, in the order of the groups that they are in."""

    groups: Tensor | None = None
    """Query groups ``[layers, groups]``."""

    experts: Tensor | None = None
    """``[layers, experts]``."""

    mamba_heads: Tensor | None = None
    """Mamba heads ``[layers, heads]``."""

    mamba_inner: Tensor | None = None
    """Channels of the Mamba heads that are kept, counted over all heads, ``[layers, c]``."""

    norm_factors: Tensor | None = None
    """What the weights of the layers' norms are multiplied by, ``[layers, norms]``."""

    mamba_norm_factors: Tensor | None = None
    """The same of Mamba layers' own norms, ``[layers, groups]``."""

    final_norm_factor: float = 1.0

    def indices(self, axis: Axis, layer: int | None, expert: int | None) -> Tensor | None:
        """Returns what is kept along a dimension of a tensor; None for everything.

        Args:
            axis: What runs along the dimension.
            layer: The source's layer that the tensor lies in; None outside layers.
            expert: The source's expert that it lies in; None outside experts.
        """
        if axis == "hidden":
            return self.hidden
        if axis.startswith("mamba"):
            return self._mamba_indices(axis, layer)
        kept = {
            "ffn": self.ffn,
            "shared": self.shared,
            "queries": self.heads,
            "key_values": self.groups,
            "experts": self.experts,
        }[axis]
        if kept is None:
            return None
        assert layer is not None, f"{axis} lie in layers"
        kept = kept[layer] if expert is None else kept[layer, expert]
        if axis in ("queries", "key_values"):
            channels = torch.arange(self.source.head_dim)
            kept = (kept.unsqueeze(-1) * self.source.head_dim + channels).reshape(-1)
        return kept

    def _mamba_indices(self, axis: Axis, layer: int | None) -> Tensor | None:
        hybrid = self.source.hybrid
        if self.mamba_heads is None or self.mamba_inner is None:
            return None
        assert hybrid is not None, "it has Mamba heads"
        assert layer is not None, f"{axis} lie in layers"
        heads, inner = self.mamba_heads[layer], self.mamba_inner[layer]
        size, states = hybrid.inner_size, torch.arange(2 * hybrid.states_size)
        kept = {
            "mamba_heads": (heads,),
            "mamba_inner": (inner,),
            "mamba_conv": (inner, size + states),
            "mamba_projection": (
                inner,
                size + inner,
                2 * size + states,
                2 * size + len(states) + heads,
            ),
        }
        return torch.cat(kept[axis])

    def mamba_norm_factor(self, layer: int) -> Tensor | None:
        """Returns what the weight of a Mamba layer's own norm is multiplied by, ``[c]``."""
        if self.mamba_norm_factors is None or self.mamba_inner is None:
            return None
        factors = self.mamba_norm_factors[layer]
        return factors.repeat_interleave(self.mamba_inner.shape[1] // len(factors))

    def norm_factor(self, layer: int | None, number: int) -> float:
        """Returns what a norm's weight is multiplied by.

        Args:
            layer: The source's layer that the norm lies in; None for the final one.
            number: Which of the layer's norms it is.
        """
        if layer is None:
            return self.final_norm_factor
        return 1.0 if self.norm_factors is None else float(self.norm_factors[layer, number])

    def expert(self, layer: int | None, number: int) -> int:
        """Returns the source's expert that becomes the target's expert ``number``."""
        return number if self.experts is None else int(self.experts[layer, number])


def select(
    target: Architecture, scores: Scores, *, layers: Sequence[int] | None = None
) -> Selection:
    """Keeps what scores highest.

    Args:
        target: The smaller model's shape.
        scores: Of the larger model.
        layers: The layers to keep, from 0; those that score highest without it.
    """
    source = scores.architecture
    heads, groups = _select_heads(target, scores)
    experts, shared = None, None
    if source.moe and target.moe:
        if target.moe.num_experts < source.moe.num_experts:
            experts = _highest(scores.experts, target.moe.num_experts)
        width = target.moe.shared_ffn_hidden_size
        if width is not None and width != source.moe.shared_ffn_hidden_size:
            shared = _highest(scores.shared, width)
    if layers is None:
        layers = _highest(scores.layers, target.num_layers).tolist()
    target = _with_pattern(source, target, layers)
    mamba_heads, mamba_inner, mamba_norm_factors = _select_mamba(target, scores)
    hidden, norm_factors, final_norm_factor = None, None, 1.0
    if target.hidden_size < source.hidden_size:
        hidden = _highest(scores.hidden, target.hidden_size)
        # A layer norm's variance is about its mean, which the channels that go change, too.
        if source.normalization != "layernorm1p":
            norm_factors, final_norm_factor = scores.norm_factors(hidden)
    ffn = None
    if target.ffn_hidden_size < source.ffn_hidden_size:
        ffn = _highest(scores.ffn, target.ffn_hidden_size)
    return Selection(
        source=source,
        target=target,
        layers=tuple(layers),
        hidden=hidden,
        ffn=ffn,
        shared=shared,
        heads=heads,
        groups=groups,
        experts=experts,
        mamba_heads=mamba_heads,
        mamba_inner=mamba_inner,
        mamba_norm_factors=mamba_norm_factors,
        norm_factors=norm_factors,
        final_norm_factor=final_norm_factor,
    )


def select_layers(source: Architecture, target: Architecture, dropped: set[int]) -> Selection:
    """Keeps all layers but those ``dropped``, which count from 1."""
    layers = tuple(n for n in range(source.num_layers) if n + 1 not in dropped)
    target = _with_pattern(source, target, layers)
    return Selection(source=source, target=target, layers=layers)


def kept_pattern(hybrid: Hybrid, layers: Sequence[int]) -> str:
    """Returns the pattern of the layers that are left of a hybrid, counted from 0.

    Raises:
        ConfigError: None of them is a Mamba layer.
    """
    pattern = "".join(hybrid.pattern[n] for n in layers)
    if "M" not in pattern:
        raise ConfigError(
            "no Mamba layer of the hybrid would be left",
            found=f"layers {pattern} of {hybrid.pattern}",
            hint="keep more layers, or name those that go with drop_layers",
        )
    return pattern


def _with_pattern(
    source: Architecture, target: Architecture, layers: Sequence[int]
) -> Architecture:
    """Lets a hybrid's pattern follow the layers that are kept."""
    if source.hybrid is None or target.hybrid is None:
        return target
    pattern = kept_pattern(source.hybrid, layers)
    return replace(target, hybrid=replace(target.hybrid, pattern=pattern))


def _select_mamba(
    target: Architecture, scores: Scores
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Keeps each group's best Mamba heads, of each head its best channels, and scales the norms."""
    before, after = scores.architecture.hybrid, target.hybrid
    if before is None or after is None:
        return None, None, None
    if (before.mamba_num_heads, before.mamba_head_dim) == (
        after.mamba_num_heads,
        after.mamba_head_dim,
    ):
        return None, None, None
    groups, width = before.mamba_num_groups, before.mamba_head_dim
    grouped = scores.mamba_heads.reshape(len(scores.mamba_heads), groups, -1)
    within = _highest(grouped, after.mamba_num_heads // groups)
    first = torch.arange(groups).unsqueeze(-1) * grouped.shape[-1]
    heads = (within + first).flatten(1)
    channels = _highest(scores.mamba_channels, after.mamba_head_dim)
    of_heads = channels.gather(1, heads.unsqueeze(-1).expand(-1, -1, channels.shape[-1]))
    inner = (heads.unsqueeze(-1) * width + of_heads).flatten(1)
    return heads, inner, scores.mamba_norm_factors(list(inner), groups)


def _select_heads(target: Architecture, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
    """Keeps the groups whose best heads are best, and in each its best heads."""
    source = scores.architecture
    shape = (source.num_attention_heads, source.num_query_groups)
    if shape == (target.num_attention_heads, target.num_query_groups):
        return None, None
    per_group = source.num_attention_heads // source.num_query_groups
    kept_per_group = target.num_attention_heads // target.num_query_groups
    grouped = scores.heads.reshape(source.num_layers, source.num_query_groups, per_group)
    best = grouped.topk(kept_per_group, dim=-1).values
    groups = _highest(best.sum(-1), target.num_query_groups)
    within = _highest(grouped, kept_per_group)
    heads = within + per_group * torch.arange(source.num_query_groups).unsqueeze(-1)
    kept = heads.gather(1, groups.unsqueeze(-1).expand(-1, -1, kept_per_group))
    return kept.reshape(source.num_layers, -1), groups


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores along the last dimension, increasing; ties keep the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
