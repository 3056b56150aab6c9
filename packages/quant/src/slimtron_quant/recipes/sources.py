"""From a recipe's name to the ModelOpt config that it stands for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import (
    QuantConfig,
    QuantizerEntry,
    config_names,
    named_config,
    recipe_config,
    recipe_names,
)
from slimtron_quant.recipes.files import RecipeFile, read_recipe_file
from slimtron_quant.recipes.kv_cache import KvCache, kv_cache_in
from slimtron_quant.recipes.settings import linear_settings, method_of
from slimtron_quant.recipes.table import (
    MODELOPT_PREFIX,
    NO_RECIPE,
    Recipe,
    is_file,
    recipe_named,
)

__all__ = ["Source", "load_source", "modelopt_names"]

_UNKNOWN = "not known: see what the recipe is made of"
_ALL_OFF = QuantizerEntry("*", enable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A recipe ready to be applied to a model."""

    recipe: Recipe
    config: QuantConfig
    is_tunable: bool = False
    """Whether ``sq_alpha`` and ``awq_block_size`` apply: they do to Slimtron's own recipes."""

    block_size: int | Literal["auto"] | None = None
    """Size that a recipe file asks for."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, str | None] = field(default_factory=dict)
    kv_cache: KvCache | None = None
    """What it does to the KV cache."""


def load_source(name: str | None, *, where: str = "algorithm") -> Source:
    """Opens a recipe.

    Args:
        name: One of Slimtron's recipes, ``modelopt:NAME``, or the path of a recipe file; None
            for one that does nothing.
        where: The setting that names it, for errors.

    Raises:
        ConfigError: There is no such recipe, or the file is wrong.
        MissingDependencyError: ModelOpt is absent, or too old for one of Slimtron's recipes.
    """
    if name is None:
        return Source(recipe=NO_RECIPE, config=QuantConfig((_ALL_OFF,)))
    if is_file(name):
        return _from_file(Path(name))
    if name.startswith(MODELOPT_PREFIX):
        return _described(name, _modelopt_config(name.removeprefix(MODELOPT_PREFIX), where), where)
    recipe = recipe_named(name, where=where)
    return Source(recipe=recipe, config=named_config(str(recipe.modelopt_config)), is_tunable=True)


def modelopt_names() -> list[str]:
    """Returns what may follow ``modelopt:`` in a recipe's name, by the installed ModelOpt."""
    return [*config_names(), *recipe_names()]


def _modelopt_config(name: str, where: str) -> QuantConfig:
    if name in config_names():
        return named_config(name)
    if name in recipe_names():
        return recipe_config(name)
    names = modelopt_names()
    by_last_part = {full.rpartition("/")[2].upper(): full for full in reversed(names)}
    close = difflib.get_close_matches(name.upper(), by_last_part, n=3, cutoff=0.5)
    raise ConfigError(
        "the installed ModelOpt has no such config",
        where=where,
        found=f"{MODELOPT_PREFIX}{name}",
        allowed="what `slimtron-quant recipes --modelopt` lists",
        hint=f"did you mean {', '.join(by_last_part[key] for key in close)}?" if close else None,
    )


def _from_file(path: Path) -> Source:
    file = read_recipe_file(path)
    try:
        return _assembled(file, str(path))
    except ConfigError as error:
        error.where = f"{path}: {error.where}"
        raise


def _assembled(file: RecipeFile, name: str) -> Source:
    if file.recipe is None:
        source = _described(name, file.modelopt_config(), where="quant_cfg")
    else:
        if is_file(file.recipe):
            raise ConfigError(
                "a recipe file cannot start from another",
                where="recipe",
                found=file.recipe,
                allowed=f"a recipe's name, {MODELOPT_PREFIX}NAME, or `quant_cfg`",
            )
        source = load_source(file.recipe, where="recipe")
        if isinstance(file.algorithm, Mapping):
            settings = {"method": method_of(source.config), **file.algorithm}
            if isinstance(source.config.algorithm, Mapping):
                settings = {**source.config.algorithm, **settings}
            source = replace(source, config=source.config.with_algorithm(settings))
        summary = file.description or f"{file.recipe}, changed by a file"
        source = replace(source, recipe=replace(source.recipe, name=name, summary=summary))
    if file.block_size is not None and source.recipe.block_size is None:
        raise ConfigError("the recipe has no blocks", where="block_size", found=file.block_size)
    return replace(
        source,
        block_size=file.block_size,
        include=file.include,
        exclude=file.exclude,
        overrides=file.overrides,
    )


def _described(name: str, config: QuantConfig, where: str) -> Source:
    """Derives a recipe's properties from its entries.

    They are those of the most finely coded of the four linear layers of a transformer layer,
    for a config may name some of them.
    """
    kv_cache = kv_cache_in(config, name=name, where=where)
    layer = "decoder.layers.0"
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj")
    settings = [
        linear_settings(config, f"{layer}.{linear}")
        for linear in (*linears, "mlp.linear_fc1", "mlp.linear_fc2")
    ]
    weight_bits = min(item.weight_bits for item in settings)
    activation_bits = min(item.activation_bits for item in settings)
    method = method_of(config)
    recipe = Recipe(
        name=name,
        summary=f"{weight_bits}-bit weights, {activation_bits}-bit activations, "
        f"algorithm {method or 'max'}",
        hardware=_UNKNOWN,
        engines=_UNKNOWN,
        accuracy=_UNKNOWN,
        modelopt_config=name.removeprefix(MODELOPT_PREFIX) if not is_file(name) else None,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        block_size=min((size for item in settings for size in item.in_blocks), default=None),
        needs_calibration=method not in (None, "max")
        or any(item.needs_calibration for item in settings)
        or (kv_cache is not None and kv_cache.needs_calibration),
        rewrites_weights=method not in (None, "max"),
        needs_cuda=any(item.needs_cuda for item in settings)
        or (kv_cache is not None and kv_cache.needs_cuda),
        kv_cache=kv_cache.qformat if kv_cache else None,
    )
    # ModelOpt quantizes to 8 bits what no entry names, and its configs of the KV cache name no
    # linear layer.
    config = (
        config
        if config.entries[0] == _ALL_OFF
        else replace(config, entries=(_ALL_OFF, *config.entries))
    )
    return Source(recipe=recipe, config=config, kv_cache=kv_cache)
