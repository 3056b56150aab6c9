"""Experts that processes share out are calibrated and written as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import ParallelismError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import (
    ParallelConfig,
    ParallelContext,
    forward_only,
    initialize_parallel,
)
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_quant import ExportConfig, QuantizationConfig, Quantizer, calibration_loop
from slimtron_quant.__main__ import main
from slimtron_quant.calibration.experts import ExpertTokens
from slimtron_quant.calibration.scales import MendedScale
from slimtron_quant.calibration.state import save_calibration

CONFIGS = {
    "fp8": QuantizationConfig("fp8"),
    "int8_sq": QuantizationConfig("int8_sq"),
    "int4_awq": QuantizationConfig("int4_awq", 16),
    # Each process treats its first expert in another way, one of them as it was.
    "mixed": QuantizationConfig(
        "fp8",
        16,
        exclude=("*.local_experts.0",),
        overrides={"*.local_experts.2": "int4"},
        calibrate_all_experts=True,
    ),
    # Nothing is left to do for the second process of two.
    "one expert": QuantizationConfig("fp8", include=("decoder.layers.1.mlp.*.local_experts.1",)),
}
LAYOUTS = {
    "tp1": ParallelConfig(),
    "ep2": ParallelConfig(expert_parallel_size=2),
    "tp2": ParallelConfig(tensor_parallel_size=2),
    # Two copies of a model whose experts are shared out to two processes each.
    "ep2-dp4": ParallelConfig(expert_parallel_size=2),
    "pp2-ep2": ParallelConfig(pipeline_parallel_size=2, expert_parallel_size=2),
    "tp2-ep2-sp": ParallelConfig(
        tensor_parallel_size=2, expert_parallel_size=2, sequence_parallel=True
    ),
}

Outcome = tuple[list[ExpertTokens], list[MendedScale]]


def _export_all(
    rank: int, world_size: int, model_dir: Path, out: Path, layouts: list[str]
) -> list[dict[str, Outcome]]:
    sequences = torch.randint(0, 300, (8, 32), generator=torch.Generator().manual_seed(3))
    found = []
    for name in layouts:
        with initialize_parallel(LAYOUTS[name], device="cpu") as context:
            batches = list(sequences[context.dp_rank :: context.dp_size].split(2))
            found.append(
                {
                    key: _export(config, model_dir, out / name / key, batches, context)
                    for key, config in CONFIGS.items()
                }
            )
    return found


def _export(
    config: QuantizationConfig,
    model_dir: Path,
    out: Path,
    batches: list[torch.Tensor],
    context: ParallelContext,
) -> Outcome:
    """Writes the model with the scales that were kept, as a resumed job does."""
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    kept = out.with_name(f"{out.name}-scales")
    kept.mkdir(parents=True, exist_ok=True)
    quantizer = Quantizer(config, ExportConfig(out))
    for step in ("calibrate", "restore"):
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        if step == "calibrate":
            quantizer.quantize(model, calibration_loop(batches, context))
            save_calibration(kept, model, context)
            context.barrier()
        else:
            quantizer.restore(model, kept, context)
    quantizer.export(model, model_dir)
    return quantizer.experts, quantizer.mended


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose first layer never sends a token to its last two experts."""
    path = write_tiny_model(
        tmp_path_factory.mktemp("model") / "mixture",
        "qwen3_moe",
        num_hidden_layers=2,
        num_experts_per_tok=1,
        norm_topk_prob=False,
    )
    tensors = load_file(path / "model.safetensors")
    router = tensors["model.layers.0.mlp.gate.weight"]
    # Of two opposite numbers one is positive.
    router[1] = -router[0]
    router[2:] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("one")
    ((found,),) = run_ranks(_export_all, 1, model, folder, ["tp1"])
    return folder / "tp1", found


def test_one_process_counts_and_completes(one: tuple[Path, dict[str, Outcome]]) -> None:
    folder, found = one
    idle = "decoder.layers.0.mlp.experts.local_experts"
    names = [f"{idle}.{e}.linear_fc{n}.input_quantizer" for e in (2, 3) for n in (1, 2)]
    for key, (experts, mended) in found.items():
        assert [layer.layer for layer in experts] == [0, 1]
        assert [sum(layer.tokens) for layer in experts] == [256, 256]
        assert experts[0].below(1) == (2, 3)
        completed = [item.quantizer for item in mended if "no token" in item.reason]
        assert completed == (names if key in ("fp8", "int8_sq") else [])
    tensors = load_file(folder / "fp8" / "model.safetensors")
    layer = "model.layers.0.mlp.experts"
    # Engines take one scale for all experts, and one for both halves of the first product.
    for scales in (
        {
            float(tensors[f"{layer}.{e}.{w}.input_scale"])
            for e in range(4)
            for w in ("gate_proj", "up_proj")
        },
        {float(tensors[f"{layer}.{e}.down_proj.input_scale"]) for e in range(4)},
        {float(tensors[f"{layer}.3.{w}.weight_scale"]) for w in ("gate_proj", "up_proj")},
    ):
        assert len(scales) == 1


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [(2, ["ep2", "tp2"]), (4, ["ep2-dp4", "pp2-ep2", "tp2-ep2-sp"])],
    ids=["two", "four"],
)
def test_every_layout_writes_what_one_process_writes(
    world_size: int,
    layouts: list[str],
    model: Path,
    one: tuple[Path, dict[str, Outcome]],
    tmp_path: Path,
) -> None:
    expected_at, outcome = one
    ranks = run_ranks(_export_all, world_size, model, tmp_path, layouts)
    for name, *found in zip(layouts, *ranks, strict=True):
        assert found == [outcome] * world_size, name
        for key in CONFIGS:
            _compare(expected_at / key, tmp_path / name / key, exact="tp2" not in name)


def _compare(expected_at: Path, found_at: Path, *, exact: bool) -> None:
    expected = load_file(expected_at / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in sorted(found_at.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        where = f"{found_at} {key}"
        assert found[key].dtype == tensor.dtype, where
        if exact and "awq" not in found_at.name:
            assert torch.equal(found[key].float(), tensor.float()), where
        else:
            # Partial sums are added in another order, and a code may fall the other way.
            near = torch.isclose(found[key].float(), tensor.float(), rtol=1e-2, atol=0)
            assert float(near.float().mean()) > 0.999, where
    for file in ("config.json", "hf_quant_config.json"):
        assert (found_at / file).read_text() == (expected_at / file).read_text()


def _job(rank: int, world_size: int, model_dir: Path, out: Path) -> None:
    code = main(
        [
            *("run", "--model", f"hf:{model_dir}", "--recipe", "fp8", "--out", str(out)),
            *("--data", "pydoc", "--calib-size", "4", "--calib-seq-len", "32"),
            *("--calib-batch-size", "2", "--eval-tokens", "128", "--eval-seq-len", "32"),
            *("--device", "cpu", "--ep", str(world_size)),
        ]
    )
    assert code == 0
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    if world_size > 1:
        with initialize_parallel(ParallelConfig(expert_parallel_size=2), device="cpu") as context:
            built = build_model(checkpoint.architecture, context, dtype=torch.float32)
            batches = [torch.zeros(1, 8, dtype=torch.int64)] * (1 + rank)
            # Without this one process would wait for ever.
            with pytest.raises(ParallelismError, match="equally many batches"):
                forward_only(built, batches, context)


def test_the_job_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    run_ranks(_job, 1, model, tmp_path / "one")
    run_ranks(_job, 2, model, tmp_path / "two")
    for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[1]["tables"] == reports[0]["tables"]
    titles = [table["title"] for table in reports[0]["tables"]]
    assert titles[1:] == ["Scales that were mended", "Calibration tokens of each expert"]
    assert "expert 2" in reports[1]["facts"]["Layout"]
