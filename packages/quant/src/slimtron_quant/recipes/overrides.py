"""Which recipes can stand side by side in one model."""

from __future__ import annotations

from slimtron_common.errors import ConfigError
from slimtron_quant.recipes.settings import method_of
from slimtron_quant.recipes.sources import Source
from slimtron_quant.recipes.table import RECIPES

__all__ = ["PLAIN_METHODS", "check_override"]

PLAIN_METHODS = (None, "max")
"""Algorithms that leave weights alone and look at every quantizer by itself."""


def check_override(base: Source, override: Source, *, where: str) -> None:
    """Refuses a recipe that cannot take over layers from another.

    Args:
        base: The recipe of the whole model.
        override: The recipe of some layers.
        where: The setting, for the error.

    Raises:
        ConfigError: With the recipes that can.
    """
    method, name = method_of(override.config), override.recipe.name
    if override.kv_cache is not None:
        raise ConfigError(
            "the KV cache is quantized in all layers or in none, not by an override",
            where=where,
            found=name,
            hint="set enable_kv_cache, and take a recipe for linear layers alone here",
        )
    if method not in PLAIN_METHODS:
        raise ConfigError(
            f"only the recipe of the whole model can be one that searches, as {method} does",
            where=where,
            found=name,
            allowed=", ".join(n for n, recipe in RECIPES.items() if not recipe.rewrites_weights),
            hint=f"take {name} as the algorithm and the other recipe as the override",
        )
    searching = method_of(base.config)
    if searching in (*PLAIN_METHODS, "awq_lite"):
        return
    if searching == "smoothquant" and override.recipe.activation_bits == 16:
        return
    raise ConfigError(
        f"{searching} calibrates the inputs of every layer that has quantized ones, and this "
        "recipe's would come out wrong",
        where=where,
        found=name,
        allowed="null, to leave the layers as they are"
        + "".join(
            f", {n}"
            for n, recipe in RECIPES.items()
            if searching == "smoothquant"
            and recipe.activation_bits == 16
            and not recipe.rewrites_weights
        ),
    )
