"""What the real model loses, and that ours is not worse than ModelOpt's own call."""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.evaluation import evaluate
from slimtron_common.integrations.modelopt import named_config, to_modelopt
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import read_report
from slimtron_quant.__main__ import main
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.preflight import preflight
from slimtron_quant.quantizer import calibration_loop

pytestmark = pytest.mark.model


def _arguments(demo_model: Path, out: Path, recipe: str, eval_tokens: int) -> list[str]:
    return [
        *("run", "--model", f"hf:{demo_model}", "--recipe", recipe, "--out", str(out)),
        *("--data", "pydoc", "--block-size", "auto", "--eval-tokens", str(eval_tokens)),
        *("--calib-size", "2", "--calib-seq-len", "512", "--calib-batch-size", "1"),
        *("--device", "cpu"),
    ]


def test_fp8_is_near_the_original_and_not_worse_than_modelopt(
    demo_model: Path, tmp_path: Path
) -> None:
    assert main(_arguments(demo_model, tmp_path / "out", "fp8", 4096)) == 0
    original, memory, exported = (
        column.metrics for column in read_report(tmp_path / "out").columns
    )
    assert memory["perplexity"] <= 1.06 * original["perplexity"]
    assert exported["perplexity"] <= 1.06 * original["perplexity"]

    from slimtron_common.config import build_config

    plan = preflight(
        build_config(
            QuantJobConfig,
            flags={
                "model": f"hf:{demo_model}",
                "export.path": str(tmp_path / "peer"),
                "device": "cpu",
                "quantization.calibration_dataset": "pydoc",
                "quantization.calibration_dataset_size": 2,
                "quantization.calibration_seq_len": 512,
                "quantization.calibration_batch_size": 1,
            },
        )
    )
    checkpoint = open_checkpoint(f"hf:{demo_model}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        loop = calibration_loop(plan.calibration.batches(1), context)
        mtq.quantize(model, to_modelopt(named_config("FP8_DEFAULT_CFG")), loop)
        peer = evaluate(
            model,
            plan.evaluation.batches(1),
            context,
            vocab_size=checkpoint.architecture.vocab_size,
        )
    # The embedding and the norms have the type that is written, which moves some roundings.
    assert memory["perplexity"] <= 1.005 * peer.perplexity


def test_int4_awq_decodes_from_its_files_alone(demo_model: Path, tmp_path: Path) -> None:
    """Upstream's export of the same model decodes to a perplexity of 709,495."""
    assert main(_arguments(demo_model, tmp_path / "out", "int4_awq", 1024)) == 0
    _, memory, exported = (column.metrics for column in read_report(tmp_path / "out").columns)
    assert exported["perplexity"] == pytest.approx(memory["perplexity"], rel=0.01)
    assert exported["kl_memory"] < 1e-3
    assert exported["bits_per_weight"] < 7
