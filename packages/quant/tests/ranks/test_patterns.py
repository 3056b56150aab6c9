"""Patterns count layers over the whole model, wherever its layers lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_quant import ExportConfig, QuantizationConfig, Quantizer, calibration_loop

CONFIGS = {
    # The other pipeline stage has nothing to quantize.
    "first layer alone": QuantizationConfig("fp8", include=("decoder.layers.0",)),
    "second layer alone": QuantizationConfig("int4", 16, include=("decoder.layers.1",)),
    "mixed": QuantizationConfig(
        "fp8",
        16,
        exclude=("decoder.layers.0.mlp.linear_fc1",),
        overrides={"*.linear_fc2": "int4", "decoder.layers.1.self_attention": "int8"},
    ),
    "beside AWQ": QuantizationConfig("int4_awq", 16, overrides={"decoder.layers.1.mlp": "fp8"}),
}


def _export(rank: int, world_size: int, model_dir: Path, out: Path, layout: ParallelConfig) -> None:
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    tokens = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(3))
    with initialize_parallel(layout, device="cpu") as context:
        for name, config in CONFIGS.items():
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            quantizer = Quantizer(config, ExportConfig(out / name))
            quantizer.quantize(model, calibration_loop(list(tokens.split(2)), context))
            if name == "mixed":
                formats = {layer.name: layer.format for layer in quantizer.layers}
                reasons = {layer.name: layer.reason for layer in quantizer.layers}
                assert formats["decoder.layers.1.self_attention.linear_qkv"] == "int8"
                assert formats["decoder.layers.1.mlp.linear_fc2"] == "int4"
                fc1 = "decoder.layers.0.mlp.linear_fc1"
                assert (formats[fc1], reasons[fc1]) == (None, f"excluded by {fc1}")
            quantizer.export(model, model_dir)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("one")
    model = write_tiny_model(folder / "model", num_hidden_layers=2, vocab_size=300)
    (folder / "out").mkdir()
    run_ranks(_export, 1, model, folder / "out", ParallelConfig())
    return model, folder / "out"


@pytest.mark.parametrize(
    "layout",
    [ParallelConfig(pipeline_parallel_size=2), ParallelConfig(tensor_parallel_size=2)],
    ids=["pp2", "tp2"],
)
def test_exports_equal_those_of_one_process(
    layout: ParallelConfig, one: tuple[Path, Path], tmp_path: Path
) -> None:
    model, expected_at = one
    run_ranks(_export, 2, model, tmp_path, layout)
    for name in CONFIGS:
        expected = load_file(expected_at / name / "model.safetensors")
        found = {}
        for file in sorted((tmp_path / name).glob("*.safetensors")):
            found |= load_file(file)
        assert found.keys() == expected.keys(), name
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype, f"{name} {key}"
            # Partial sums are added in another order at TP 2, and a code may fall the other way.
            near = torch.isclose(found[key].float(), tensor.float(), rtol=1e-2, atol=0)
            assert float(near.float().mean()) > 0.999, f"{name} {key}"
        for file in ("config.json", "hf_quant_config.json"):
            assert (tmp_path / name / file).read_text() == (expected_at / name / file).read_text()
