"""The quantization recipes, and how one becomes a ModelOpt config for a given model.

Light to import: the parts that open ModelOpt's configs or files load as they are used.
"""

from __future__ import annotations

from slimtron_quant.recipes.modules import Choice, quantizable_modules
from slimtron_quant.recipes.scheme import Scheme, quantization_recipe, quantization_scheme
from slimtron_quant.recipes.table import RECIPES, Recipe, check_recipe_name, recipe_named

__all__ = [
    "RECIPES",
    "Choice",
    "Recipe",
    "Scheme",
    "check_recipe_name",
    "quantizable_modules",
    "quantization_recipe",
    "quantization_scheme",
    "recipe_named",
]
