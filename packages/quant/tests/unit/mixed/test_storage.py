"""Sizes worked out from the architecture against exported files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import ConfigError
from slimtron_common.models.linear import linear_layers
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_quant import ExportConfig, QuantizationConfig, Quantizer, calibration_loop
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.mixed.config import MixedPrecisionConfig
from slimtron_quant.mixed.groups import format_groups
from slimtron_quant.mixed.storage import Storage, model_storage
from slimtron_quant.recipes import quantization_scheme

MODELS = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "nemotron": {},
    "mixtral": {},
}
RECIPES = ("int4_awq", "fp8", "int8_sq")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: write_tiny_model(
            folder / family, family, num_hidden_layers=1, tokenizer=False, **more
        )
        for family, more in MODELS.items()
    }


def storage_of(model: Path, recipe: str, **settings: object) -> Storage:
    architecture = open_checkpoint(f"hf:{model}").architecture
    config = QuantizationConfig(recipe, 16, **settings)  # type: ignore[arg-type]
    candidates = {recipe: quantization_scheme(config, architecture), "none": None}
    return model_storage(architecture, candidates, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", MODELS)
def test_files_have_the_expected_size(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(f"hf:{models[family]}")
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))
    for recipe in RECIPES:
        out = tmp_path / recipe
        with initialize_parallel(device="cpu") as context:
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            quantizer = Quantizer(QuantizationConfig(recipe, 16), ExportConfig(out))
            quantizer.quantize(model, calibration_loop([tokens], context))
            quantizer.export(model, models[family])
        exported = ExportedModel(out)
        storage = storage_of(models[family], recipe)
        uniform = dict.fromkeys(storage.options, recipe)
        linear = [m for m in exported.formats if m != "lm_head"]
        stored = sum(exported.stored_bits(f"{module}.weight") for module in linear)
        # Biases lie in the modules and are not weights.
        headers = exported.tensors.headers
        stored -= sum(16 * headers[name][1][0] for name in headers if name.endswith("_proj.bias"))
        expected = storage.bits(uniform) * storage.num_weights
        # Factors that fold into the layer before are counted, and not stored.
        assert stored <= expected * (1 + 1e-9)
        assert expected <= (1.01 if "awq" in recipe or "sq" in recipe else 1 + 1e-9) * stored
        # The header of the file is an upper bound.
        size = storage.num_bytes(uniform)
        assert 0 <= size - exported.tensors.weight_bytes < 4096 + 0.1 * size


def test_the_experts_of_a_layer_are_one_group(models: dict[str, Path]) -> None:
    layers = linear_layers(open_checkpoint(f"hf:{models['mixtral']}").architecture)
    groups = {group.name: group for group in format_groups(layers)}
    assert list(groups) == [
        "decoder.layers.0.self_attention.linear_qkv",
        "decoder.layers.0.self_attention.linear_proj",
        "decoder.layers.0.mlp.experts",
    ]
    experts = groups["decoder.layers.0.mlp.experts"].members
    assert len(experts) == 8
    assert "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2" in experts


def test_excluded_layers_count_and_cannot_be_chosen_for(models: dict[str, Path]) -> None:
    whole = storage_of(models["llama"], "fp8")
    part = storage_of(models["llama"], "fp8", exclude=("*.linear_fc2",))
    assert [g.name for g in whole.groups if g not in part.groups] == [
        "decoder.layers.0.mlp.linear_fc2"
    ]
    chosen = dict.fromkeys(part.options, "none")
    assert part.bits(chosen) == 16
    assert part.num_weights == whole.num_weights


@pytest.mark.parametrize(
    ("budget", "where", "message", "allowed"),
    [
        ({"bits": 8.0}, "mixed.bits", "smallest", "8.0"),
        ({"bits": 16.0}, "mixed.bits", "nothing to quantize", "16.000 bits"),
        ({"size": "1kB"}, "mixed.size", "smallest", "MB to"),
        ({"size": "1GiB"}, "mixed.size", "nothing to quantize", "MB to"),
    ],
)
def test_budgets_out_of_reach_are_refused(
    models: dict[str, Path], budget: dict[str, object], where: str, message: str, allowed: str
) -> None:
    config = MixedPrecisionConfig(candidates=("fp8", "none"), **budget)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        storage_of(models["llama"], "fp8").check(config)
    assert error.value.where == where
    assert message in str(error.value)
    assert allowed in str(error.value.allowed)
