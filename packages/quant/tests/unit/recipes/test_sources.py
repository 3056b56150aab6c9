from __future__ import annotations

import modelopt.torch.quantization as mtq
import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import config_names, named_config, recipe_names
from slimtron_common.testing.versions import needs
from slimtron_quant.recipes.sources import load_source, modelopt_names


@needs("nvidia-modelopt", "0.47", what="INT8_WEIGHT_ONLY_CFG")
def test_properties_are_derived_from_the_entries() -> None:
    recipe = load_source("modelopt:NVFP4_MLP_ONLY_CFG").recipe
    assert (recipe.weight_bits, recipe.activation_bits, recipe.block_size) == (4, 4, 16)
    assert recipe.needs_calibration
    assert recipe.needs_cuda
    recipe = load_source("modelopt:INT8_WEIGHT_ONLY_CFG").recipe
    assert (recipe.weight_bits, recipe.activation_bits, recipe.block_size) == (8, 16, None)
    assert not recipe.needs_calibration
    assert not recipe.needs_cuda
    recipe = load_source("modelopt:INT8_SMOOTHQUANT_CFG").recipe
    assert recipe.needs_calibration
    assert recipe.rewrites_weights


IN_ATTENTION = [name for name in config_names() if "_KV_" in name or "_MHA_" in name]


@pytest.mark.parametrize("name", [n for n in config_names() if n not in IN_ATTENTION])
def test_every_other_config_of_modelopt(name: str) -> None:
    source = load_source(f"modelopt:{name}")
    assert source.config == named_config(name)
    needed = mtq.need_calibration(getattr(mtq, name))
    if source.recipe.weight_bits < 16 and source.config.algorithm is not None:
        assert source.recipe.needs_calibration == needed


def test_recipe_files_that_come_with_modelopt() -> None:
    names = recipe_names()
    if not names:
        pytest.skip("this ModelOpt has no recipe files")
    assert "general/ptq/nvfp4_mlp_weight_only" in names
    assert set(names) <= set(modelopt_names())
    source = load_source("modelopt:general/ptq/int4_blockwise_weight_only")
    assert source.config.algorithm == "max"
    assert (source.recipe.weight_bits, source.recipe.block_size) == (4, 128)
    assert load_source("modelopt:general/ptq/fp8_default-kv_fp8").recipe.kv_cache == "fp8"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("FP8_DEFAULT", "FP8_DEFAULT_CFG"), ("nvfp4_default_cfg", "NVFP4_DEFAULT_CFG")],
)
def test_unknown_names_get_near_misses(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match="no such config") as error:
        load_source(f"modelopt:{name}", where="overrides.x")
    assert error.value.where == "overrides.x"
    assert meant in str(error.value.hint)
    assert "--modelopt" in str(error.value.allowed)
