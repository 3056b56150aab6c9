from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_quant.config import ExportConfig, QuantizationConfig

NEMO_QUANTIZATION = {
    "algorithm": "fp8",
    "awq_block_size": 128,
    "sq_alpha": 0.5,
    "enable_kv_cache": None,
    "kv_cache_qformat": "fp8",
    "calibration_dataset": "cnn_dailymail",
    "calibration_dataset_size": 512,
    "calibration_batch_size": 64,
    "calibration_seq_len": 128,
}
NEMO_EXPORT = {
    "dtype": "bf16",
    "decoder_type": None,
    "inference_tp": 1,
    "inference_pp": 1,
    "generate_sample": False,
}


def test_nemos_fields_come_first_in_nemos_order_with_nemos_defaults() -> None:
    fields = dataclasses.fields(QuantizationConfig)
    assert {f.name: f.default for f in fields[: len(NEMO_QUANTIZATION)]} == NEMO_QUANTIZATION
    assert [f.name for f in fields[: len(NEMO_QUANTIZATION)]] == list(NEMO_QUANTIZATION)
    export = dataclasses.fields(ExportConfig)
    assert [f.name for f in export] == ["path", "export_format", *NEMO_EXPORT]
    assert {f.name: f.default for f in export[2:]} == NEMO_EXPORT


def test_positional_use() -> None:
    assert QuantizationConfig("int4_awq", 64).awq_block_size == 64
    assert ExportConfig("out").path == Path("out")  # type: ignore[arg-type]
    assert ExportConfig(Path("out"), "hf", 16).torch_dtype == "float16"


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig().algorithm = "int8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("algorithm", "fp9"),
        ("algorithm", ""),
        ("awq_block_size", 0),
        ("awq_block_size", -128),
        ("awq_block_size", 64.0),
        ("awq_block_size", True),
        ("awq_block_size", "biggest"),
        ("sq_alpha", -0.1),
        ("sq_alpha", 1.5),
        ("sq_alpha", float("nan")),
        ("kv_cache_qformat", "int8"),
        ("calibration_dataset", " "),
        ("calibration_dataset_size", 0),
        ("calibration_batch_size", 0),
        ("calibration_seq_len", -1),
        ("exclude", "*.linear_fc2"),
        ("exclude", ("",)),
        ("include", "*.linear_fc2"),
        ("include", ("",)),
        ("overrides", {"": "fp8"}),
    ],
)
def test_quantization_values_out_of_range_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        QuantizationConfig(**{field: value})
    assert error.value.where == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", ""),
        ("export_format", "trtllm"),
        ("export_format", "onnx"),
        ("generate_sample", True),
        ("dtype", "fp8"),
        ("dtype", 8),
        ("decoder_type", "llama"),
        ("inference_tp", 2),
        ("inference_pp", 0),
    ],
)
def test_export_values_out_of_range_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        ExportConfig(**{"path": Path("out"), field: value})
    assert error.value.where == field


@pytest.mark.parametrize("recipe", ["fp9", "", "own.yaml"])
def test_overrides_name_recipes(recipe: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantizationConfig(overrides={"*.mlp": recipe})
    assert error.value.where == "overrides.*.mlp"


def test_recipes_from_elsewhere_are_taken_unopened() -> None:
    for name in ("modelopt:ANYTHING", "own.yaml", "own.yml", "nemo.json"):
        assert QuantizationConfig(name, overrides={"*.mlp": None}).algorithm == name


def test_misspelt_recipe_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean int4_awq"):
        QuantizationConfig("int4-awq")


def test_no_recipe_and_kv_cache_off_are_accepted() -> None:
    assert QuantizationConfig(None, enable_kv_cache=False).algorithm is None


def test_exclude_becomes_a_tuple() -> None:
    config = QuantizationConfig(exclude=["*.linear_fc2"])  # type: ignore[arg-type]
    assert config.exclude == ("*.linear_fc2",)
    assert hash(config) == hash(QuantizationConfig(exclude=("*.linear_fc2",)))


@pytest.mark.parametrize(
    ("dataset", "source", "field"),
    [
        ("cnn_dailymail", "hf:cnn_dailymail,3.0.0:train", "article"),
        ("wikitext", "hf:wikitext,wikitext-103-v1:train", "text"),
        ("texts.jsonl", "texts.jsonl", "text"),
        ("pydoc", "pydoc", "text"),
    ],
)
def test_calibration_source(dataset: str, source: str, field: str) -> None:
    config = QuantizationConfig(calibration_dataset=dataset)
    assert (config.calibration_source, config.calibration_text_field) == (source, field)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("bf16", "bfloat16"), (16, "float16"), ("16", "float16"), ("fp32", "float32")],
)
def test_torch_dtype(dtype: str | int, name: str) -> None:
    assert ExportConfig(Path("out"), dtype=dtype).torch_dtype == name


def test_importing_the_configs_is_light() -> None:
    code = (
        "import sys, slimtron_quant.config, slimtron_quant.recipes, slimtron_quant.errors\n"
        "heavy = {'torch', 'modelopt', 'transformers', 'yaml', 'rich', 'pydantic', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_tensorrt_llms_format_is_refused_naming_what_to_write() -> None:
    with pytest.raises(ConfigError) as error:
        ExportConfig(Path("out"), export_format="trtllm")
    assert error.value.allowed == "hf, megatron, nemo"
    assert "loads hf directories" in str(error.value.hint)
