"""A student that comes with quantizers learns with them in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint, save_megatron
from slimtron_common.integrations import modelopt_state
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import read_report
from slimtron_distill.__main__ import main

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def quantized(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with weights of four bits, by ModelOpt alone."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    weights = {"num_bits": 4, "block_sizes": {-1: 16}, "enable": True}
    settings = {
        "quant_cfg": {"default": {"enable": False}, "*layers*weight_quantizer": weights},
        "algorithm": "max",
    }
    path = tmp_path_factory.mktemp("quantized") / "student"
    checkpoint = open_checkpoint(f"hf:{tiny_teacher}")
    with initialize_parallel(device="cpu") as context, modelopt_state.quiet_modelopt():
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        quantization.quantize(model, settings)
        save_megatron(
            path, model, checkpoint.architecture, context, companions=checkpoint.companion_files()
        )
    return path


def test_it_learns_and_keeps_its_quantizers(
    arguments: Arguments, quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = ("--student", f"megatron:{quantized}", "--export-format", "megatron")
    longer = ("--steps", "24", "--seq-len", "64", "--save-interval", "24", "--eval-interval", "24")
    assert main(arguments("run", *more, *longer)) == 0
    _, start, trained = read_report(out).columns
    # Its weights are the teacher's, rounded: training makes up for the rounding.
    assert 0 < trained.metrics["kl"] < 0.95 * start.metrics["kl"]  # type: ignore[operator]
    scales = {path: _scales(path) for path in (quantized, out)}
    assert len(scales[out]) > 8
    for name, scale in scales[quantized].items():
        assert torch.equal(scales[out][name], scale), name


def _scales(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(f"megatron:{path}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        return {name: value for name, value in model.state_dict().items() if "_amax" in name}


def test_what_would_lose_them_is_refused(
    arguments: Arguments, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("run", "--student", f"megatron:{quantized}")) == 2
    message = capsys.readouterr().err
    assert "holds quantizers" in message
    assert "--export-format megatron" in message
    assert not any(tmp_path.iterdir())
