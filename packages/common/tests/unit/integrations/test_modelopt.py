from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import nn

from slimtron_common.errors import ConfigError, MissingDependencyError
from slimtron_common.integrations import modelopt as integration
from slimtron_common.integrations.modelopt import (
    QuantConfig,
    QuantizerEntry,
    check_attributes,
    config_names,
    from_modelopt,
    make_quantizer,
    named_config,
    recipe_config,
    recipe_names,
    to_modelopt,
)

# slimtron-common alone does not bring ModelOpt.
mtq = pytest.importorskip("modelopt.torch.quantization")

NAMES = sorted(mtq.config.choices)

# The shape that ModelOpt 0.37 to 0.43 gave W4A8_AWQ_BETA_CFG.
MAPPING = {
    "quant_cfg": {
        "*weight_quantizer": [
            {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}, "enable": True},
            {"num_bits": (4, 3), "axis": None, "enable": True},
        ],
        "*input_quantizer": {"num_bits": (4, 3), "axis": None, "enable": True},
        "nn.BatchNorm1d": {"*": {"enable": False}},
        "*lm_head*": {"enable": False},
        "default": {"enable": False},
    },
    "algorithm": "awq_lite",
}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64))


def quantized(config: dict[str, Any]) -> str:
    model = small_model()
    torch.manual_seed(1)
    batch = torch.randn(8, 256)
    return str(mtq.quantize(model, config, lambda m: m(batch)))


def all_configs() -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(mtq, name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_named_config_survives_the_round_trip(name: str) -> None:
    original = getattr(mtq, name)
    round_trip = to_modelopt(named_config(name))
    assert from_modelopt(round_trip) == named_config(name)
    assert round_trip["algorithm"] == original.get("algorithm")
    if isinstance(original["quant_cfg"], list):
        assert round_trip["quant_cfg"] == original["quant_cfg"]


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"])
def test_round_trip_quantizes_the_same(name: str) -> None:
    assert quantized(to_modelopt(named_config(name))) == quantized(
        copy.deepcopy(getattr(mtq, name))
    )


def test_modelopts_globals_stay_as_they_are() -> None:
    before = all_configs()
    for name in NAMES:
        config = named_config(name).with_block_size(16).with_algorithm({"method": "max"})
        written = to_modelopt(config.with_entries(QuantizerEntry("*", enable=False)))
        written["quant_cfg"].clear()
        for entry in config.entries:
            for attributes in (
                entry.attributes if isinstance(entry.attributes, tuple) else (entry.attributes,)
            ):
                if isinstance(attributes, dict):
                    for value in attributes.values():
                        if isinstance(value, dict):
                            value.clear()
                    attributes.clear()
    assert all_configs() == before


def test_block_size_is_set_in_every_blockwise_quantizer() -> None:
    config = named_config("W4A8_AWQ_BETA_CFG").with_block_size(32)
    weight, activation = (
        next(e.attributes for e in config.entries if e.pattern == pattern)
        for pattern in ("*weight_quantizer", "*input_quantizer")
    )
    assert weight == (
        {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}},
        {"num_bits": (4, 3), "axis": None},
    )
    assert activation == {"num_bits": (4, 3), "axis": None}


def test_block_size_leaves_per_token_blocks_alone() -> None:
    # {-1: None} is ModelOpt's way to say "the whole dimension".
    config = named_config("FP8_PER_CHANNEL_PER_TOKEN_CFG")
    assert config.with_block_size(32) == config


def test_reads_the_mapping_generation() -> None:
    config = from_modelopt(MAPPING)
    assert config.algorithm == "awq_lite"
    assert config.entries == (
        QuantizerEntry("*", None, enable=False),
        QuantizerEntry(
            "*weight_quantizer",
            (
                {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
                {"num_bits": (4, 3), "axis": None},
            ),
            enable=True,
        ),
        QuantizerEntry("*input_quantizer", {"num_bits": (4, 3), "axis": None}, enable=True),
        QuantizerEntry("*", None, enable=False, parent_class="nn.BatchNorm1d"),
        QuantizerEntry("*lm_head*", None, enable=False),
    )
    assert "enable" in MAPPING["quant_cfg"]["*weight_quantizer"][0]  # type: ignore[index]


def test_both_generations_quantize_the_same() -> None:
    assert quantized(to_modelopt(from_modelopt(MAPPING))) == quantized(
        to_modelopt(named_config("W4A8_AWQ_BETA_CFG"))
    )


@pytest.fixture
def mapping_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt up to 0.43, as far as ``to_modelopt`` can tell."""
    monkeypatch.setattr(mtq, "FP8_DEFAULT_CFG", {"quant_cfg": {}, "algorithm": "max"})


@pytest.mark.usefixtures("mapping_generation")
def test_writes_the_mapping_generation() -> None:
    written = to_modelopt(from_modelopt(MAPPING))
    expected = {"*": {"enable": False}, **MAPPING["quant_cfg"]}  # type: ignore[dict-item]
    del expected["default"]
    assert written == {"quant_cfg": expected, "algorithm": "awq_lite"}
    # The order of the keys is the order of application there.
    assert list(written["quant_cfg"])[:2] == ["*", "*weight_quantizer"]


@pytest.mark.usefixtures("mapping_generation")
def test_mapping_generation_keeps_the_last_word_on_a_pattern() -> None:
    config = QuantConfig(
        (
            QuantizerEntry("*weight_quantizer", {"num_bits": 8}),
            QuantizerEntry("*fc1*", enable=False),
            QuantizerEntry("*weight_quantizer", enable=False),
            QuantizerEntry("*fc1*", {"num_bits": 4}, enable=True),
        )
    )
    written = to_modelopt(config)["quant_cfg"]
    assert list(written.items()) == [
        ("*weight_quantizer", {"num_bits": 8, "enable": False}),
        ("*fc1*", {"num_bits": 4, "enable": True}),
    ]


@pytest.mark.parametrize(
    "quant_cfg",
    [
        None,
        "max",
        [{"cfg": {"num_bits": 8}}],
        [3],
        {"*weight_quantizer": "int8"},
        {len: {"num_bits": 8}},
        {"*": [{"num_bits": 4, "enable": True}, {"num_bits": 8, "enable": False}]},
    ],
)
def test_refuses_what_is_no_config(quant_cfg: object) -> None:
    with pytest.raises(ConfigError, match="quant_cfg"):
        from_modelopt({"quant_cfg": quant_cfg})


def test_unknown_name_asks_for_a_newer_modelopt() -> None:
    with pytest.raises(MissingDependencyError, match="FP2_DEFAULT_CFG") as error:
        named_config("FP2_DEFAULT_CFG")
    assert "upgrade" in str(error.value)
    with pytest.raises(MissingDependencyError):
        named_config("quantize")


def test_missing_modelopt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("modelopt"):
            raise ModuleNotFoundError("No module named 'modelopt'", name="modelopt")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match="NVIDIA ModelOpt"):
        integration.named_config("FP8_DEFAULT_CFG")


def test_block_size_is_set_along_both_dimensions() -> None:
    config = named_config("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG").with_block_size(32)
    (attributes,) = (e.attributes for e in config.entries if e.attributes)
    assert attributes["block_sizes"] == {-1: 32, -2: 32}  # type: ignore[call-overload,index]


def test_every_listed_config_can_be_read() -> None:
    assert {"FP8_DEFAULT_CFG", "INT4_AWQ_CFG"} <= set(config_names())
    for name in config_names():
        assert named_config(name).entries
    for name in recipe_names():
        assert recipe_config(name).entries


@pytest.mark.parametrize(
    ("attributes", "where"),
    [({"num_bit": 8}, "x.num_bit"), ({"axis": 0, "block_sizes": {-1: 16}}, "x.block_sizes")],
)
def test_attributes_that_modelopt_does_not_take(attributes: dict[str, object], where: str) -> None:
    check_attributes({"num_bits": (4, 3), "axis": None}, where="x")
    with pytest.raises(ConfigError) as error:
        check_attributes(attributes, where="x")
    assert error.value.where == where


def test_quantizers_by_their_attributes() -> None:
    assert not make_quantizer([]).is_enabled
    assert make_quantizer([{"num_bits": (4, 3)}]).num_bits == (4, 3)
    assert [q.num_bits for q in make_quantizer([{"num_bits": 4}, {"num_bits": 8}])] == [4, 8]
