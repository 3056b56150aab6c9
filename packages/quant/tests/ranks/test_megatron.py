"""A quantized Megatron checkpoint opens in any layout, and with ModelOpt's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import (
    ParallelConfig,
    ParallelContext,
    forward_only,
    initialize_parallel,
)
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_common.testing.versions import needs
from slimtron_quant import ExportConfig, QuantizationConfig, Quantizer, calibration_loop

RECIPES: dict[str, dict[str, Any]] = {
    # Scales by output channel and block, cut with the gate and up projection.
    "int4_awq": {},
    # Two quantizers in sequence, and none at all in the stage whose settings ModelOpt keeps.
    "w4a8_awq": {"include": ("*.layers.1",)},
}

pytestmark = needs("nvidia-modelopt", "0.47", what="layers that keep quantizers without pickling")
TOKENS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, context: ParallelContext) -> Tensor:
    found = [torch.zeros(0)]
    forward_only(model, [TOKENS], context, lambda _, x: found.append(x.clone()))
    return found[-1]


def _write(
    rank: int, world_size: int, model_dir: Path, out: Path, layout: ParallelConfig
) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    found = {}
    with initialize_parallel(layout, device="cpu") as context:
        for recipe, settings in RECIPES.items():
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            quantizer = Quantizer(
                QuantizationConfig(recipe, awq_block_size=16, **settings),
                ExportConfig(out / recipe, export_format="megatron", dtype="32"),
            )
            quantizer.quantize(model, calibration_loop([TOKENS], context))
            found[recipe] = _logits(model, context)
            quantizer.export(model, model_dir)
    return found


def _read(
    rank: int, world_size: int, out: Path, layout: ParallelConfig, with_modelopt: bool
) -> dict[str, Tensor]:
    found = {}
    with initialize_parallel(layout, device="cpu") as context:
        for recipe in RECIPES:
            checkpoint = open_checkpoint(f"megatron:{out / recipe}")
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            found[recipe] = _logits(model, context)
        if with_modelopt:
            path = out / "int4_awq"
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            _restore_with_modelopt(model, path / "weights")
            found["modelopt"] = _logits(model, context)
    return found


def _restore_with_modelopt(model: Any, weights: Path) -> None:
    """What a Megatron training script does."""
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state

    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    restore_sharded_modelopt_state([model], str(weights))
    state = dist_checkpointing.load(model.sharded_state_dict(prefix=""), str(weights))
    model.load_state_dict(state)


def test_written_at_tp2_pp2_it_opens_at_one_and_at_pp2(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=2)
    layout = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    written = run_ranks(_write, 4, model, tmp_path, layout)
    one = run_ranks(_read, 1, tmp_path, ParallelConfig(), True)[0]
    staged = run_ranks(_read, 2, tmp_path, ParallelConfig(pipeline_parallel_size=2), False)[1]
    for recipe in RECIPES:
        expected = torch.cat([rank[recipe] for rank in written], -1)[..., :300]
        assert float(expected.std()) > 0.1
        # Partial sums are added in another order.
        torch.testing.assert_close(one[recipe], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(staged[recipe], one[recipe])
    assert torch.equal(one["modelopt"], one["int4_awq"])
