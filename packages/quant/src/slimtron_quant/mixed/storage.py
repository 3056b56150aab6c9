"""What a model takes on disk in each of the candidate formats, from its architecture alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.linear import linear_layers
from slimtron_common.models.mapping import Parameter, model_parameters
from slimtron_quant.formats import format_named
from slimtron_quant.mixed.config import UNQUANTIZED, MixedPrecisionConfig
from slimtron_quant.mixed.groups import FormatGroup, format_groups
from slimtron_quant.recipes import Scheme

__all__ = ["Storage", "model_storage"]

_FILE_HEADER = 1024
_TENSOR_HEADER = 100
"""Bytes that a safetensors file spends on its own, and at most on a tensor beside its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Sizes in bits."""

    groups: tuple[FormatGroup, ...]
    """The groups that there is something to choose for."""

    options: Mapping[str, Mapping[str, int]]
    """What the weights of each group take in each candidate, scales and factors included."""

    headers: Mapping[str, Mapping[str, int]]
    """What the file's header says of them."""

    fixed_linear: int
    """Weights of linear layers that stay as they are, whatever is chosen."""

    fixed_other: int
    """Everything else in the files."""

    num_weights: int
    """Weights of the decoder's linear layers."""

    def cost(self, group: str, candidate: str, config: MixedPrecisionConfig) -> int:
        """Returns what a choice takes of the budget."""
        header = 0 if config.num_bytes is None else self.headers[group][candidate]
        return self.options[group][candidate] + header

    def available(self, config: MixedPrecisionConfig) -> float:
        """Returns what the budget leaves for the groups; may be negative."""
        if config.bits is not None:
            return config.bits * self.num_weights - self.fixed_linear
        assert config.num_bytes is not None, "there is a budget"
        return 8 * config.num_bytes - self.fixed_linear - self.fixed_other

    def bits(self, chosen: Mapping[str, str]) -> float:
        """Returns stored bits for each weight of the linear layers."""
        return (self._weights(chosen) + self.fixed_linear) / self.num_weights

    def num_bytes(self, chosen: Mapping[str, str]) -> int:
        """Returns the size of the files, at most."""
        headers = sum(self.headers[group][candidate] for group, candidate in chosen.items())
        return math.ceil(
            (self._weights(chosen) + headers + self.fixed_linear + self.fixed_other) / 8
        )

    def check(self, config: MixedPrecisionConfig) -> None:
        """Refuses a budget that no choice meets, or that the model meets as it is.

        Raises:
            ConfigError: With the smallest and the largest that make sense.
        """
        smallest, largest = self._extremes(config)
        left = self.available(config)
        where = "mixed.bits" if config.bits is not None else "mixed.size"
        allowed = self.described_range(config)
        if sum(self.cost(*item, config) for item in smallest.items()) > left:
            raise ConfigError(
                "the smallest of the candidates takes more than the budget",
                where=where,
                found=config.budget,
                allowed=allowed,
                hint="add a smaller format to the candidates, or raise the budget",
            )
        if set(largest.values()) == {UNQUANTIZED} and left >= sum(
            self.cost(*item, config) for item in largest.items()
        ):
            raise ConfigError(
                "the budget holds the model as it is: there is nothing to quantize",
                where=where,
                found=config.budget,
                allowed=allowed,
            )

    def described_range(self, config: MixedPrecisionConfig) -> str:
        """Returns the smallest and the largest that can be chosen, in the budget's unit."""
        smallest, largest = self._extremes(config)
        # Rounded up: what is said to be possible has to be.
        if config.bits is None:
            sizes = (math.ceil(self.num_bytes(x) / 1e4) / 100 for x in (smallest, largest))
            return "{:.2f}MB to {:.2f}MB".format(*sizes)
        bits = (math.ceil(self.bits(x) * 1000) / 1000 for x in (smallest, largest))
        return "{:.3f} to {:.3f} bits a weight".format(*bits)

    def _extremes(self, config: MixedPrecisionConfig) -> tuple[dict[str, str], dict[str, str]]:
        smallest, largest = (
            {
                group: pick(options, key=lambda name: self.cost(group, name, config))
                for group, options in self.options.items()
            }
            for pick in (min, max)
        )
        return smallest, largest

    def _weights(self, chosen: Mapping[str, str]) -> int:
        return sum(self.options[group][candidate] for group, candidate in chosen.items())


def model_storage(
    architecture: Architecture, candidates: Mapping[str, Scheme | None], *, dtype: torch.dtype
) -> Storage:
    """Measures every group of layers in every candidate that applies to all of it.

    Args:
        architecture: The whole model.
        candidates: What each would make of the model by itself; None for leaving it as it is.
        dtype: Type of what stays unquantized.
    """
    parameters = {
        rule.names[0].format(layer=layer, expert=rule.expert).removesuffix(".weight"): rule
        for layer, rule in model_parameters(architecture)
    }
    layers = linear_layers(architecture)
    free = {name for scheme in candidates.values() if scheme for name in scheme.settings}
    groups = format_groups(layer for layer in layers if layer.name in free)
    options: dict[str, dict[str, int]] = {}
    headers: dict[str, dict[str, int]] = {}
    for group in groups:
        fitting = {
            name: scheme
            for name, scheme in candidates.items()
            if scheme is None or all(member in scheme.settings for member in group.members)
        }
        options[group.name], headers[group.name] = {}, {}
        for name, scheme in (fitting or {UNQUANTIZED: None}).items():
            sizes = [_tensors(m, parameters[m], scheme, dtype) for m in group.members]
            options[group.name][name] = sum(sum(tensors.values()) for tensors in sizes)
            headers[group.name][name] = sum(map(_header, sizes))
    kept = [_tensors(x.name, parameters[x.name], None, dtype) for x in layers if x.name not in free]
    names = {layer.name for layer in layers}
    others = [
        _tensors(name, rule, None, dtype) for name, rule in parameters.items() if name not in names
    ]
    return Storage(
        groups=tuple(groups),
        options=options,
        headers=headers,
        fixed_linear=sum(sum(tensors.values()) for tensors in kept),
        fixed_other=sum(sum(tensors.values()) for tensors in others)
        + sum(map(_header, kept + others))
        + 8 * _FILE_HEADER,
        num_weights=sum(layer.in_features * layer.out_features for layer in layers),
    )


def _header(tensors: Mapping[str, int]) -> int:
    return 8 * sum(_TENSOR_HEADER + len(name) for name in tensors)


def _tensors(
    module: str, rule: Parameter, scheme: Scheme | None, dtype: torch.dtype
) -> dict[str, int]:
    """The tensors that a module lies in, in bits."""
    width = 8 * dtype.itemsize
    if scheme is None:
        return {
            name: width * math.prod(shape)
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }
    written = scheme.formats[module]
    fmt = format_named(written.name)
    # Factors in front of the other layers are folded into the norm before them.
    has_factor = (rule.layout.dim == -1 or rule.expert is not None) and (
        scheme.recipe.rewrites_weights and scheme.choices[module].recipe == scheme.recipe.name
    )
    if rule.layout.dim == -1 and fmt.always_stores_input_factor:
        has_factor = True
    found: dict[str, int] = {}
    for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
        stem = name.removesuffix("weight")
        sizes = fmt.stored_bits(shape, written.block_size)
        found |= {f"{stem}{suffix}": bits for suffix, bits in sizes.items()}
        if has_factor:
            found[f"{stem}pre_quant_scale"] = width * shape[1]
    return found
