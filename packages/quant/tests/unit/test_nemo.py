"""Quantizing NeMo 2's own objects, where NeMo is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.conversion import convert, plan_conversion
from slimtron_common.integrations.modelopt import takes_mappings
from slimtron_common.integrations.nemo import describe_with_nemo
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import (
    ParallelContext,
    forward_only,
    initialize_parallel,
    unwrap_model,
)
from slimtron_common.testing.nemo import (
    nemo_on_cpu,
    nemo_test,
    open_in_nemo,
    train_step,
)
from slimtron_quant import ExportConfig, QuantizationConfig, Quantizer
from slimtron_quant.__main__ import main


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NeMo 2 checkpoint of a Llama of two layers."""
    path = tmp_path_factory.mktemp("nemo") / "tiny"
    convert(plan_conversion(f"hf:{tiny_model}", f"nemo2:{path}", device="cpu"))
    return path


def config(recipe: str) -> QuantizationConfig:
    return QuantizationConfig(
        recipe,
        awq_block_size=32,
        calibration_dataset="pydoc",
        calibration_dataset_size=8,
        calibration_batch_size=4,
        calibration_seq_len=32,
    )


def scales(model: Any) -> dict[str, torch.Tensor]:
    buffers = unwrap_model(model).named_buffers()
    return {name: value.clone() for name, value in buffers if "_quantizer." in name}


def logits(model: Any, context: ParallelContext) -> torch.Tensor:
    found: list[torch.Tensor] = []
    tokens = torch.arange(24).reshape(1, 24)
    forward_only(model, [tokens], context, lambda _, x: found.append(x[..., :300].clone()))
    return found[0]


@pytest.mark.skipif(takes_mappings(), reason="ModelOpt is of NeMo's generation")
def test_what_nemos_modelopt_could_not_read_is_refused(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("plan", "--export-format", "nemo")) == 2
    assert "older than the one here" in capsys.readouterr().err


@nemo_test
def test_a_job_for_nemo(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "job"
    assert main(arguments("run", "--export-format", "nemo", "--export-dtype", "32", out=out)) == 0
    assert main(["verify", str(out), "--eval-tokens", "64", "--eval-seq-len", "32"]) == 0
    with nemo_on_cpu():
        model, trainer = open_in_nemo(out)
        before, after = train_step(model)
        assert after < before
        # As NeMo's own script writes it.
        trainer.strategy.trainer = trainer
        trainer.save_checkpoint(tmp_path / "trained")
        describe_with_nemo(trainer)(tmp_path / "trained" / "context")
    served = ["export", f"nemo2:{tmp_path / 'trained'}", "--out", str(tmp_path / "served")]
    assert main([*served, "--eval-tokens", "64", "--eval-seq-len", "32", "--device", "cpu"]) == 0


@nemo_test
@pytest.mark.parametrize("recipe", ["fp8", "int8_sq", "int4_awq"])
def test_nemos_megatron_parallel(recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    with nemo_on_cpu():
        _, trainer = open_in_nemo(checkpoint)
        model = trainer.strategy.megatron_parallel
        quantizer = Quantizer(
            config(recipe), ExportConfig(tmp_path / "out", export_format="nemo", dtype=32)
        )
        assert quantizer.quantize(model) is model
        context = ParallelContext.from_megatron(device=torch.device("cpu"))
        opened = open_checkpoint(f"nemo2:{checkpoint}")
        plain: Any = build_model(opened.architecture, context, dtype=torch.float32)
        opened.load(plain, context)
        plain.tokenizer = opened.tokenizer()
        Quantizer(config(recipe)).quantize(plain)
        expected = scales(plain)
        assert len(expected) >= 8
        torch.testing.assert_close(scales(model), expected, rtol=1e-5, atol=0)
        found = logits(model, context)
        torch.testing.assert_close(found, logits(plain, context), rtol=0, atol=1e-4)
        # As NeMo's script calls it.
        quantizer.export(model, str(checkpoint), trainer)
        other = ExportConfig(tmp_path / "own", export_format="nemo", dtype=32)
        Quantizer(config(recipe), other).export(plain, str(checkpoint))

    for path in (tmp_path / "out", tmp_path / "own"):
        with nemo_on_cpu():
            again, trainer = open_in_nemo(path)
            torch.testing.assert_close(scales(again), expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(logits(again, context), found, rtol=0, atol=1e-4)
            before, after = train_step(again)
            assert after < before
    opened = open_checkpoint(f"nemo2:{tmp_path / 'out'}")
    assert opened.is_quantized
    with initialize_parallel(device="cpu") as context:
        plain = build_model(opened.architecture, context, dtype=torch.float32)
        opened.load(plain, context)
        torch.testing.assert_close(logits(plain, context), found, rtol=0, atol=1e-4)
