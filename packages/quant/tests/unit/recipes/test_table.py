from __future__ import annotations

import modelopt.torch.quantization as mtq
import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import named_config
from slimtron_common.testing.versions import needs
from slimtron_quant.recipes import RECIPES, check_recipe_name, recipe_named
from slimtron_quant.recipes.settings import linear_settings, method_of

NEWER = needs("nvidia-modelopt", "0.47", what="the config")

NAMES = [
    *("fp8", "fp8_pc_pt", "block_fp8", "int8", "int8_sq", "int4", "int4_awq", "w4a8_awq"),
    *("nvfp4", "nvfp4_awq", "w4a16_nvfp4", "mxfp4", "mxfp8"),
]


def test_registry() -> None:
    assert list(RECIPES) == NAMES
    for name, recipe in RECIPES.items():
        assert recipe_named(name) is recipe
        assert recipe.name == name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=NEWER if n == "w4a16_nvfp4" else (),
        )
        for n in RECIPES
    ],
)
def test_the_row_says_what_modelopts_config_does(name: str) -> None:
    recipe = RECIPES[name]
    config = named_config(str(recipe.modelopt_config))
    settings = linear_settings(config, "decoder.layers.0.mlp.linear_fc1")
    assert settings.weight_bits == recipe.weight_bits
    assert settings.activation_bits == recipe.activation_bits
    assert settings.in_blocks == ({recipe.block_size} if recipe.block_size else set())
    assert settings.needs_cuda == recipe.needs_cuda
    assert (method_of(config) in (None, "max")) != recipe.rewrites_weights
    # Microscaling has nothing to calibrate, though ModelOpt's own answer is that it has.
    calibrates = mtq.need_calibration(getattr(mtq, str(recipe.modelopt_config)))
    assert recipe.needs_calibration == (calibrates and not name.startswith("mx"))


@pytest.mark.parametrize("name", ["fp9", "", "nvfp", "modelopt-FP8"])
def test_what_cannot_be_a_recipe_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no such recipe") as error:
        check_recipe_name(name, where="overrides.x")
    assert error.value.where == "overrides.x"
    assert "fp8, fp8_pc_pt" in str(error.value.allowed)


def test_misspelt_recipes_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean int4_awq"):
        recipe_named("int4-awq")


@pytest.mark.parametrize("name", ["modelopt:ANY", "a.yaml", "dir/b.yml", "c.json"])
def test_what_may_be_one_is_not_opened(name: str) -> None:
    check_recipe_name(name)
