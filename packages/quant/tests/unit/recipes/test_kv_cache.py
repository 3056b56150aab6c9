from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import (
    QuantConfig,
    QuantizerEntry,
    config_names,
    named_config,
    recipe_names,
)
from slimtron_common.models.architecture import Architecture
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.recipes import Scheme, quantization_scheme
from slimtron_quant.recipes.kv_cache import kv_cache_in, named_kv_cache
from slimtron_quant.recipes.settings import quantizer_settings
from slimtron_quant.recipes.sources import load_source

# SmolLM2-135M.
SMOLLM = Architecture(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
KEYS = "decoder.layers.7.self_attention.core_attention.k_bmm_quantizer"
FP8 = {"num_bits": (4, 3), "axis": None}


def scheme(*args: Any, **kwargs: Any) -> Scheme:
    return quantization_scheme(QuantizationConfig(*args, **kwargs), SMOLLM)


@pytest.mark.parametrize(("qformat", "name"), [("fp8", "FP8_KV_CFG"), ("nvfp4", "NVFP4_KV_CFG")])
def test_both_formats_are_modelopts(qformat: str, name: str) -> None:
    found = named_kv_cache(qformat)
    assert found.qformat == qformat
    assert found.needs_calibration
    # ModelOpt 0.37 also says that other quantizers of its configs are off.
    entry = next(e for e in named_config(name).entries if "bmm" in e.pattern)
    assert (found.entry.pattern, found.entry.attributes) == (entry.pattern, entry.attributes)


def test_it_calibrates_recipes_that_only_round_weights() -> None:
    assert not scheme("int4", 64).needs_calibration
    with_cache = scheme("int4", 64, enable_kv_cache=True)
    assert with_cache.needs_calibration
    assert with_cache.formats == scheme("int4", 64).formats
    assert quantizer_settings(with_cache.modelopt_config().entries, KEYS) == (FP8,)


def test_without_a_recipe_all_weights_stay() -> None:
    alone = scheme(None, enable_kv_cache=True, kv_cache_qformat="nvfp4")
    assert not alone.settings
    assert set(alone.reasons.values()) == {"no recipe"}
    config = alone.modelopt_config()
    assert config.algorithm == "max"
    assert config.entries == (QuantizerEntry("*", enable=False), named_kv_cache("nvfp4").entry)
    with pytest.raises(ConfigError, match="no recipe to quantize with"):
        scheme(None)


@pytest.mark.parametrize("field", ["include", "exclude", "overrides"])
def test_without_a_recipe_patterns_choose_nothing(field: str) -> None:
    value = {"*.mlp": "fp8"} if field == "overrides" else ("*.mlp",)
    with pytest.raises(ConfigError, match="no layers to choose") as error:
        QuantizationConfig(None, enable_kv_cache=True, **{field: value})
    assert error.value.where == field


def test_nvfp4_needs_a_gpu() -> None:
    found = scheme("fp8", enable_kv_cache=True, kv_cache_qformat="nvfp4")
    found.check_device("cuda")
    with pytest.raises(ConfigError, match="CUDA GPU only") as error:
        found.check_device("cpu")
    assert (error.value.where, error.value.allowed) == ("kv_cache_qformat", "fp8")
    with pytest.raises(ConfigError, match="CUDA GPU only") as error:
        scheme("modelopt:NVFP4_KV_CFG").check_device("cpu")
    assert (error.value.where, error.value.allowed) == ("algorithm", "fp8")


def nemo_file(folder: Path, **entries: Any) -> str:
    """A JSON file as NeMo writes one for FP8 weights, and ``entries``."""
    fp8 = {"num_bits": [4, 3], "axis": None, "enable": True}
    quant_cfg = {"*weight_quantizer": fp8, "*input_quantizer": fp8, **entries}
    path = folder / "recipe.json"
    path.write_text(json.dumps({"quant_cfg": quant_cfg, "algorithm": "max"}))
    return str(path)


def test_a_recipe_file_decides_unless_the_config_does(tmp_path: Path) -> None:
    file = nemo_file(tmp_path, **{"*[kv]_bmm_quantizer": {"num_bits": [4, 3], "axis": None}})
    assert load_source(file).recipe.kv_cache == "fp8"
    by_file = scheme(file).kv_cache
    assert by_file is not None
    assert by_file.qformat == "fp8"
    off = scheme(file, enable_kv_cache=False)
    assert off.kv_cache is None
    assert quantizer_settings(off.modelopt_config().entries, KEYS) == ()
    other = scheme(file, enable_kv_cache=True, kv_cache_qformat="nvfp4").kv_cache
    assert other is not None
    assert other.qformat == "nvfp4"


def test_configs_of_modelopt() -> None:
    alone = load_source("modelopt:FP8_KV_CFG")
    assert (alone.recipe.weight_bits, alone.recipe.kv_cache) == (16, "fp8")
    # ModelOpt would quantize the linear layers to 8 bits: its config does not name them.
    assert scheme("modelopt:FP8_KV_CFG").modelopt_config().entries[0].enable is False
    if "general/ptq/fp8_default-kv_fp8_cast" not in recipe_names():
        pytest.skip("this ModelOpt has no recipe files")
    constant = scheme("modelopt:general/ptq/nvfp4_default-kv_fp8_cast").kv_cache
    assert constant is not None
    assert not constant.needs_calibration
    calibrated = scheme("modelopt:general/ptq/fp8_default-kv_fp8").kv_cache
    assert calibrated == named_kv_cache("fp8")


def test_an_override_is_for_linear_layers() -> None:
    with pytest.raises(ConfigError, match="all layers or in none") as error:
        scheme("int4", 64, overrides={"*.linear_fc2": "modelopt:FP8_KV_CFG"})
    assert error.value.where == "overrides.*.linear_fc2"


@pytest.mark.parametrize(
    "name", [n for n in config_names() if "AFFINE" in n or "ROTATE" in n or "_MHA_" in n]
)
def test_what_no_engine_caches_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_source(f"modelopt:{name}")
    assert name in str(error.value.found)


@pytest.mark.parametrize(
    "entries",
    [
        [("*k_bmm_quantizer", FP8)],
        [("*k_bmm_quantizer", FP8), ("*v_bmm_quantizer", {"num_bits": 8})],
        [("*layers.0.*[kv]_bmm_quantizer", FP8)],
        [("*layers.3.*[kv]_bmm_quantizer", FP8)],
        # A name of Hugging Face's: it would match nothing in a Megatron model.
        [("*self_attn.[kv]_bmm_quantizer", FP8)],
        [("*[kv]_bmm_quantizer", {"num_bits": 8})],
        [("*[kv]_bmm_quantizer", {"num_bits": (4, 3), "axis": 0})],
        [("*bmm_quantizer", FP8)],
        [("*softmax_quantizer", FP8)],
    ],
)
def test_parts_of_a_cache_are_refused(entries: list[tuple[str, dict[str, Any]]]) -> None:
    config = QuantConfig(tuple(QuantizerEntry(pattern, item) for pattern, item in entries))
    with pytest.raises(ConfigError, match=r"r\.json") as error:
        kv_cache_in(config, name="r.json", where="quant_cfg")
    assert error.value.where == "quant_cfg"
