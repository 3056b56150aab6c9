"""Cut a smaller model out of the named tensors of a larger one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from slimtron_common.models.mapping import model_parameters
from slimtron_prune.selection import Axis, Selection

__all__ = ["Cut", "Cutter"]

# Sizes that no two axes share: in a model of these a shape tells what runs along each dimension.
_PROBE: dict[str, Any] = {
    "hidden_size": 1_000_003,
    "ffn_hidden_size": 1_000_033,
    "vocab_size": 1_000_037,
    "num_attention_heads": 200_006,
    "num_query_groups": 100_003,
    "head_dim": 1,
}
_SHARED = 1_000_039
_MAMBA_HEADS = 400_009
_AXES: dict[int, Axis] = {
    _PROBE["hidden_size"]: "hidden",
    _PROBE["ffn_hidden_size"]: "ffn",
    _PROBE["num_attention_heads"]: "queries",
    _PROBE["num_query_groups"]: "key_values",
    _SHARED: "shared",
}


@dataclass(frozen=True, slots=True)
class Cut:
    """One tensor of the smaller model, and what it is cut from."""

    name: str
    of: str
    """Name of the larger model's tensor."""

    layer: int | None
    """The larger model's layer."""

    expert: int | None
    axes: tuple[Axis | None, ...]
    """What runs along each dimension; None for what is never cut."""

    factor: float | Tensor
    """What is left is multiplied by this: 1, but for norms over fewer channels."""


class Cutter:
    """Turns tensors of the source of a selection into those of its target.

    Tensors go by Hugging Face's names and shapes, whole over all processes.

    Args:
        selection: What is kept.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.cuts = {cut.name: cut for cut in _cuts(selection)}
        """By the name in the smaller model, in its order."""

    def reader(self, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """Makes a reader of the smaller model's tensors of one of the larger's."""

        def read_cut(name: str) -> Tensor:
            cut = self.cuts[name]
            return self._apply(cut, read(cut.of))

        return read_cut

    def tensors(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the smaller model's tensors, one at a time."""
        read_cut = self.reader(read)
        for name in self.cuts:
            yield name, read_cut(name)

    def _apply(self, cut: Cut, tensor: Tensor) -> Tensor:
        for dim, axis in enumerate(cut.axes):
            kept = None if axis is None else self.selection.indices(axis, cut.layer, cut.expert)
            if kept is not None and len(kept) < tensor.shape[dim]:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        if isinstance(cut.factor, Tensor):
            return (tensor.float() * cut.factor.to(tensor.device)).to(tensor.dtype)
        if cut.factor == 1:
            return tensor
        stored_less = 1 if self.selection.source.normalization.endswith("1p") else 0
        return ((tensor.float() + stored_less) * cut.factor - stored_less).to(tensor.dtype)


def _cuts(selection: Selection) -> Iterator[Cut]:
    source, target = selection.source, selection.target
    axes = dict(_AXES)
    if source.moe:
        axes[source.moe.num_experts] = "experts"
    # Layers are alike, and experts: one layer of each kind says which axes a tensor has.
    moe, hybrid, num_layers = source.moe, source.hybrid, 1
    if moe and moe.shared_ffn_hidden_size is not None:
        moe = replace(moe, shared_ffn_hidden_size=_SHARED)
    if hybrid:
        hybrid = replace(hybrid, pattern="M*-", mamba_num_heads=_MAMBA_HEADS, mamba_head_dim=2)
        num_layers = len(hybrid.pattern)
        states = 2 * hybrid.states_size
        axes[_MAMBA_HEADS], axes[hybrid.inner_size] = "mamba_heads", "mamba_inner"
        axes[hybrid.inner_size + states] = "mamba_conv"
        axes[2 * hybrid.inner_size + states + _MAMBA_HEADS] = "mamba_projection"
    probe = replace(source, num_layers=num_layers, moe=moe, hybrid=hybrid, **_PROBE)
    shapes = {(rule.names, rule.expert): rule.hf_shapes for _, rule in model_parameters(probe)}
    rules = {(layer, rule.names, rule.expert): rule for layer, rule in model_parameters(source)}
    norms: Counter[int | None] = Counter()
    for new_layer, rule in model_parameters(target):
        layer = None if new_layer is None else selection.layers[new_layer]
        expert = rule.expert
        if expert is not None:
            expert = selection.expert(layer, expert)
        old = rules[layer, rule.names, expert]
        for name, of, shape in zip(
            rule.hf_names, old.hf_names, shapes[rule.names, expert], strict=True
        ):
            along = tuple(axes.get(size) for size in shape)
            factor: float | Tensor = 1.0
            if along == ("hidden",):
                # Only a norm has a weight for each hidden channel.
                factor = selection.norm_factor(layer, norms[layer])
                norms[layer] += 1
            elif along == ("mamba_inner",):
                assert layer is not None, "Mamba layers have a norm of their own"
                own = selection.mamba_norm_factor(layer)
                factor = 1.0 if own is None else own
            yield Cut(name, of, layer, expert, along, factor)
