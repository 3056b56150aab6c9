from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import QuantizerEntry
from slimtron_quant.recipes.files import read_recipe_file
from slimtron_quant.recipes.settings import linear_settings
from slimtron_quant.recipes.sources import load_source

MODULE = "decoder.layers.0.mlp.linear_fc1"


def write(tmp_path: Path, content: Any, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "recipe: int4_awq\nalgorithm: {alpha_step: 0.5}\nblock_size: auto\n"
        'exclude: ["*.linear_proj"]\noverrides: {"*.linear_fc2": fp8, "decoder.layers.1": null}\n',
    )
    file = read_recipe_file(path)
    assert (file.recipe, file.block_size, file.exclude) == ("int4_awq", "auto", ("*.linear_proj",))
    source = load_source(str(path))
    assert source.config.algorithm == {"method": "awq_lite", "alpha_step": 0.5}
    assert source.overrides == {"*.linear_fc2": "fp8", "decoder.layers.1": None}
    assert source.recipe.name == str(path)
    assert source.recipe.needs_calibration


# What NeMo's own tests and users have: patterns, lists for tuples, strings for integer keys.
NEMO = {
    "quant_cfg": {
        "*weight_quantizer": [
            {"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}, "enable": True},
            {"num_bits": [4, 3], "axis": None, "enable": True},
        ],
        "*input_quantizer": {"num_bits": [4, 3], "axis": None, "enable": True},
        "*lm_head*": {"enable": False},
        "nn.BatchNorm1d": {"*": {"enable": False}},
        "default": {"enable": False},
    },
    "algorithm": {"method": "awq_lite", "alpha_step": 1},
}


def test_nemos_json(tmp_path: Path) -> None:
    path = write(tmp_path, NEMO, "nemo.json")
    source = load_source(str(path))
    assert linear_settings(source.config, MODULE).weight == (
        {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
        {"num_bits": (4, 3), "axis": None},
    )
    assert linear_settings(source.config, MODULE).inputs == ({"num_bits": (4, 3), "axis": None},)
    assert source.config.algorithm == {"method": "awq_lite", "alpha_step": 1}
    assert (source.recipe.weight_bits, source.recipe.activation_bits) == (4, 8)
    assert source.recipe.block_size == 128
    assert not source.is_tunable


def test_what_no_entry_names_stays_as_it_is(tmp_path: Path) -> None:
    content = {"quant_cfg": [{"quantizer_name": "*fc1.weight_quantizer", "cfg": {"num_bits": 8}}]}
    config = load_source(str(write(tmp_path, content, "list.json"))).config
    assert config.entries[0] == QuantizerEntry("*", enable=False)
    assert linear_settings(config, MODULE).weight == ({"num_bits": 8},)
    assert linear_settings(config, "decoder.layers.0.mlp.linear_fc2").weight == ()


def test_floats_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'quant_cfg: {"*weight_quantizer": {num_bits: e2m1, block_sizes: '
        '{"-1": 16, type: dynamic, scale_bits: e4m3}}}\n',
    )
    assert linear_settings(load_source(str(path)).config, MODULE).weight == (
        {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    )


REFUSED: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "nothing": ({}, "r.json", ("`recipe` or `quant_cfg`", "neither")),
    "both": ({"recipe": "fp8", "quant_cfg": {}}, "r.json", ("both",)),
    "unknown key": ({"recipe": "fp8", "exclud": []}, "r.json", ("exclud", "did you mean exclude")),
    "unknown key in YAML": ("recipe: fp8\nblock: 3\n", "r.yaml", ("r.yaml: block", "unknown")),
    "wrong type": ("recipe: fp8\nexclude: x\n", "r.yaml", ("r.yaml: exclude", "a list")),
    "block size": ("recipe: int4\nblock_size: 0\n", "r.yaml", ("block_size", "positive")),
    "no blocks": ("recipe: fp8\nblock_size: 64\n", "r.yaml", ("block_size", "no blocks")),
    "unknown recipe": ("recipe: fp9\n", "r.yaml", ("r.yaml: recipe", "did you mean fp8")),
    "a file on a file": ("recipe: other.yaml\n", "r.yaml", ("recipe", "other.yaml")),
    "unknown config": ("recipe: modelopt:FP9\n", "r.yaml", ("r.yaml: recipe", "modelopt:FP9")),
    "a name for settings": ("recipe: int8\nalgorithm: max\n", "r.yaml", ("algorithm", "mapping")),
    "not YAML": ("recipe: [", "r.yaml", ("r.yaml line 1", "YAML")),
    "not safe": ("!!python/object/apply:os.system ['x']", "r.yaml", ("r.yaml",)),
    "not JSON": ("{", "r.json", ("r.json", "JSON")),
    "key twice": ('{"recipe": "fp8", "recipe": "int8"}', "r.json", ("twice",)),
    "no mapping": ([], "r.json", ("r.json", "mapping")),
    "no config": ({"quant_cfg": {"*": "x"}}, "r.json", ("quant_cfg",)),
    "unknown attribute": (
        {"quant_cfg": {"*weight_quantizer": {"num_bit": 8}}},
        "r.json",
        ("r.json: quant_cfg.*weight_quantizer.num_bit", "not permitted"),
    ),
    "attributes that exclude each other": (
        {"quant_cfg": {"*weight_quantizer": {"axis": 0, "block_sizes": {"-1": 16}}}},
        "r.json",
        ("quant_cfg.*weight_quantizer", "axis must be None"),
    ),
    "part of the attention": (
        {"quant_cfg": {"*[qkv]_bmm_quantizer": {"num_bits": [4, 3]}}},
        "r.json",
        ("quant_cfg", "q_bmm_quantizer"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    content, file, said = REFUSED[name]
    path = write(tmp_path, content, file)
    with pytest.raises(ConfigError) as error:
        load_source(str(path))
    assert str(path) in str(error.value.where)
    for text in said:
        assert text in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_source(str(tmp_path / "nothing.yaml"))
