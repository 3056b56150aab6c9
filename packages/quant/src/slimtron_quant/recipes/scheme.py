"""What a quantization config comes to on a given model: a recipe for every linear layer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import QuantConfig, QuantizerEntry
from slimtron_common.models.architecture import Architecture
from slimtron_quant.recipes.blocks import fitting_block_size
from slimtron_quant.recipes.kv_cache import KV_CACHE_QFORMATS, KvCache, named_kv_cache
from slimtron_quant.recipes.modules import Choice, choose
from slimtron_quant.recipes.overrides import PLAIN_METHODS, check_override
from slimtron_quant.recipes.rules import with_model_rules
from slimtron_quant.recipes.settings import LinearSettings, linear_settings, method_of
from slimtron_quant.recipes.sources import Source, load_source
from slimtron_quant.recipes.table import RECIPES, Recipe

if TYPE_CHECKING:
    from slimtron_common.models.linear import LinearLayer
    from slimtron_quant.config import QuantizationConfig
    from slimtron_quant.formats.detect import LayerFormat

__all__ = ["Scheme", "quantization_recipe", "quantization_scheme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A config applied to a model. Modules are named as in the whole model."""

    recipe: Recipe
    """The recipe of the modules that no pattern names."""

    layers: Mapping[str, LinearLayer]
    """Every module that could be quantized."""

    choices: Mapping[str, Choice]
    """What becomes of each of them."""

    settings: Mapping[str, LinearSettings]
    """The quantizers of those that are quantized."""

    config: QuantConfig
    """ModelOpt's config of ``recipe``, block sizes settled."""

    formats: Mapping[str, LayerFormat]
    """How those that are quantized are written."""

    kv_cache: KvCache | None
    """What becomes of the KV cache; None where it stays as it is."""

    @property
    def method(self) -> str | None:
        """ModelOpt's name of the calibration algorithm; None for none."""
        return method_of(self.config)

    @property
    def needs_calibration(self) -> bool:
        """Whether text has to run through the model."""
        return (
            self.method not in PLAIN_METHODS
            or any(item.needs_calibration for item in self.settings.values())
            or (self.kv_cache is not None and self.kv_cache.needs_calibration)
        )

    @property
    def needs_cuda(self) -> bool:
        """Whether ModelOpt computes one of the formats on a GPU only."""
        return any(item.needs_cuda for item in self.settings.values()) or (
            self.kv_cache is not None and self.kv_cache.needs_cuda
        )

    def modelopt_config(
        self,
        *,
        layer_offset: int = 0,
        num_layers: int | None = None,
        experts: range | None = None,
    ) -> QuantConfig:
        """Returns the config for one process.

        Embedding and output layer stay as they are.

        Args:
            layer_offset: Layers before the process's first: Megatron-Core numbers the layers of
                each pipeline stage from 0.
            num_layers: Layers of the process; None for all that follow.
            experts: The process's experts; None for all.
        """
        stage = range(layer_offset, layer_offset + num_layers if num_layers else sys.maxsize)
        held = range(sys.maxsize) if experts is None else experts
        config, overridden = self.config, []
        if any(
            layer.layer in stage and (layer.expert is None or layer.expert in held)
            for layer in map(self.layers.__getitem__, self.settings)
        ):
            entries = [_disabled("output_layer"), _disabled("embedding")]
            for pattern, name in self._exceptions(layer_offset, held):
                entries.append(_disabled(pattern))
                if name in self.settings:
                    entries += _enabled(pattern, self.settings[name])
                    overridden.append(f"*{pattern}")
            config = config.with_entries(*entries)
        else:
            # ModelOpt refuses a config that would quantize weights and finds none.
            config = QuantConfig((QuantizerEntry("*", enable=False),))
        if self.kv_cache is not None:
            config = config.with_entries(self.kv_cache.entry)
        elif self.recipe.kv_cache is not None:
            config = config.with_entries(QuantizerEntry("*_bmm_quantizer", enable=False))
        return config.with_algorithm(self._algorithm(overridden))

    def describe(self) -> str:
        """Returns in a line how many layers become what."""
        recipes = Counter(self.choices[module].recipe for module in self.settings)
        reasons = Counter(self.reasons.values())
        return ", ".join(
            [f"{count} to {name}" for name, count in recipes.items()]
            + [f"{count} as they are ({reason})" for reason, count in reasons.items()]
        )

    @property
    def reasons(self) -> dict[str, str]:
        """Why modules stay as they are."""
        return {m: choice.reason for m, choice in self.choices.items() if m not in self.settings}

    def setting_of(self, module: str) -> str:
        """Returns the setting that chose a module's recipe, for errors."""
        return "algorithm" if self.choices[module].recipe == self.recipe.name else "overrides"

    def check_device(self, device: str) -> None:
        """Refuses a CPU for a format that ModelOpt has only a CUDA kernel for.

        Args:
            device: ``cpu`` or ``cuda``.

        Raises:
            ConfigError: Naming the recipes that run here.
        """
        if device == "cuda" or not self.needs_cuda:
            return
        module = next((m for m, item in self.settings.items() if item.needs_cuda), None)
        if module is not None:
            where, name = self.setting_of(module), self.choices[module].recipe
            allowed = [name for name, recipe in RECIPES.items() if not recipe.needs_cuda]
        else:
            assert self.kv_cache is not None
            qformat = self.kv_cache.qformat
            where = "algorithm" if self.recipe.kv_cache == qformat else "kv_cache_qformat"
            name = f"KV cache in {qformat}"
            allowed = [known for known in KV_CACHE_QFORMATS if known != qformat]
        raise ConfigError(
            "ModelOpt computes this format on a CUDA GPU only",
            where=where,
            found=f"{name} on {device}",
            allowed=", ".join(allowed),
            hint="`slimtron-common doctor` shows whether this machine has a usable GPU",
        )

    def _algorithm(self, overridden: list[str]) -> str | Mapping[str, Any] | None:
        algorithm = self.config.algorithm
        if self.method is None and (
            self.needs_calibration or any(item.needs_maxima for item in self.settings.values())
        ):
            return "max"
        if self.method == "awq_lite" and overridden:
            settings = algorithm if isinstance(algorithm, Mapping) else {}
            return {"method": self.method, **settings, "skip": tuple(overridden)}
        return algorithm

    def _exceptions(self, layer_offset: int, experts: range) -> Iterator[tuple[str, str]]:
        """This process's modules that ``recipe`` does not quantize.

        Each as a pattern with the name of a module that it stands for; those of earlier stages
        and processes are left out. The experts of a layer go together where they are treated
        alike, for ModelOpt compares every pattern with every quantizer.
        """
        groups: dict[tuple[int, str, Choice], list[LinearLayer]] = {}
        for name, layer in self.layers.items():
            choice = self.choices[name]
            if choice.recipe != self.recipe.name and layer.layer >= layer_offset:
                groups.setdefault((layer.layer, layer.kind, choice), []).append(layer)
        sizes = Counter((layer.layer, layer.kind) for layer in self.layers.values())
        for (number, kind, _), members in groups.items():
            if members[0].expert is not None and len(members) == sizes[number, kind]:
                local = kind.replace("experts.", "experts.*")
                yield f"decoder.layers.{number - layer_offset}.{local}", members[0].name
                continue
            for layer in members:
                if layer.expert is None or layer.expert in experts:
                    local = layer.local_name(first_layer=layer_offset, first_expert=experts.start)
                    yield local, layer.name


def quantization_scheme(
    config: QuantizationConfig, architecture: Architecture, *, tensor_parallel_size: int = 1
) -> Scheme:
    """Applies a config to a model, refusing what does not fit it.

    Args:
        config: Recipe, its settings, and the patterns of modules.
        architecture: The whole model.
        tensor_parallel_size: Processes that share a layer: each holds a part of the input
            channels of the row-parallel ones.

    Raises:
        ConfigError: A block size does not divide a dimension, a pattern matches nothing, a
            recipe cannot be an override, nothing is left to quantize, or no format on disk
            holds the result. With a quantized KV cache all weights may stay.
        MissingDependencyError: ModelOpt is absent, or too old for the recipe.
    """
    from slimtron_common.models.linear import linear_layers
    from slimtron_quant.recipes.storage import formats_on_disk

    source = load_source(config.algorithm)
    kv_cache = _kv_cache(source, config)
    if config.algorithm is None and kv_cache is None:
        raise ConfigError("no recipe to quantize with", where="algorithm", found=None)
    base = source.recipe.name
    overrides = {**source.overrides, **config.overrides}
    layers = {layer.name: layer for layer in linear_layers(architecture)}
    choices = choose(
        list(layers),
        base,
        include=config.include or source.include,
        exclude=(*source.exclude, *config.exclude),
        overrides=overrides,
    )
    sources = {base: replace(source, config=_tuned(source, config, architecture))}
    for pattern, name in overrides.items():
        if name is not None and name != base:
            where = f"overrides.{pattern}"
            sources[name] = load_source(name, where=where)
            check_override(source, sources[name], where=where)
    configs = {}
    for name, item in sources.items():
        members = [layers[module] for module, choice in choices.items() if choice.recipe == name]
        configs[name] = _with_blocks(item, config, members, tensor_parallel_size)
    is_any_chosen = any(choice.recipe is not None for choice in choices.values())
    settings = {}
    for module, choice in choices.items():
        if choice.recipe is not None:
            found = linear_settings(configs[choice.recipe], module)
            if found.weight:
                settings[module] = found
            else:
                reason = f"{choice.recipe} leaves it out" if config.algorithm else "no recipe"
                choices[module] = Choice(None, reason)
    if not settings and kv_cache is None:
        raise ConfigError(
            "the recipe names no linear layer of this model: nothing is quantized"
            if is_any_chosen
            else "every layer is excluded: nothing is quantized",
            where="algorithm" if is_any_chosen or not config.exclude else "exclude",
            found=base if is_any_chosen else ", ".join(config.exclude) or dict(overrides),
        )
    scheme = Scheme(
        recipe=source.recipe,
        layers=layers,
        choices=choices,
        settings=settings,
        config=configs[base],
        formats={},
        kv_cache=kv_cache,
    )
    formats = formats_on_disk(scheme, architecture, tensor_parallel_size=tensor_parallel_size)
    return replace(scheme, formats=formats)


def quantization_recipe(
    config: QuantizationConfig,
    architecture: Architecture,
    *,
    tensor_parallel_size: int = 1,
    layer_offset: int = 0,
) -> QuantConfig:
    """Returns the ModelOpt config that quantizes this process's part of a model.

    Args:
        config: As for ``quantization_scheme``, with the same errors.
        architecture: The whole model.
        tensor_parallel_size: Processes that share a layer.
        layer_offset: Layers before this process's first.
    """
    scheme = quantization_scheme(config, architecture, tensor_parallel_size=tensor_parallel_size)
    return scheme.modelopt_config(layer_offset=layer_offset)


def _kv_cache(source: Source, config: QuantizationConfig) -> KvCache | None:
    if config.enable_kv_cache is None:
        return source.kv_cache
    return named_kv_cache(config.kv_cache_qformat) if config.enable_kv_cache else None


def _tuned(source: Source, config: QuantizationConfig, architecture: Architecture) -> QuantConfig:
    """Applies ``sq_alpha`` and what the model asks for, where the recipe leaves it open."""
    if not source.is_tunable:
        return source.config
    tuned = with_model_rules(source.config, architecture)
    if method_of(tuned) == "smoothquant":
        settings = tuned.algorithm if isinstance(tuned.algorithm, Mapping) else {}
        return tuned.with_algorithm({"method": "smoothquant", "alpha": config.sq_alpha, **settings})
    return tuned


def _with_blocks(
    source: Source,
    config: QuantizationConfig,
    layers: Iterable[LinearLayer],
    tensor_parallel_size: int,
) -> QuantConfig:
    """Settles the size of a recipe's blocks on the layers that use it."""
    size, where = source.block_size, "algorithm"
    if size is None:
        if not source.is_tunable or not source.recipe.has_blocks:
            return source.config
        size, where = config.awq_block_size, "awq_block_size"
    quantized = [x for x in layers if linear_settings(source.config, x.name).weight]
    return source.config.with_block_size(
        fitting_block_size(size, quantized, tensor_parallel_size, where=where)
    )


def _disabled(pattern: str) -> QuantizerEntry:
    # The model may sit inside another module: its names need not begin with "decoder".
    return QuantizerEntry(f"*{pattern}.*", enable=False)


def _enabled(pattern: str, settings: LinearSettings) -> Iterator[QuantizerEntry]:
    # ModelOpt up to 0.43 keeps the attributes that an entry does not name: name the ones that the
    # recipe underneath may have set.
    blank = {"axis": None, "block_sizes": None, "type": "static"}
    for quantizer, attributes in (("weight", settings.weight), ("input", settings.inputs)):
        if attributes:
            full = tuple({**blank, **item} for item in attributes)
            yield QuantizerEntry(
                f"*{pattern}.{quantizer}_quantizer", full if len(full) > 1 else full[0], enable=True
            )
