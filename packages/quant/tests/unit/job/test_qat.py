"""From a quantized Megatron checkpoint through training to what engines load."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.conversion import plan_conversion
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.manifest import read_manifest, verify_manifest
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import read_report
from slimtron_common.testing.versions import needs
from slimtron_quant.__main__ import main
from slimtron_quant.export.reader import ExportedModel

SCRIPT = Path(__file__).parents[5] / "examples" / "quantize" / "qat.py"
pytestmark = needs("nvidia-modelopt", "0.47", what="layers that keep quantizers without pickling")
TEXT = ("--eval-tokens", "192", "--eval-seq-len", "32")


@pytest.fixture(scope="module")
def quantized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    arguments = ["run", "--model", f"hf:{tiny_model}", "--recipe", "int4_awq", "--block-size", "16"]
    arguments += ["--data", "pydoc", "--calib-size", "4", "--calib-seq-len", "32"]
    arguments += ["--calib-batch-size", "2", "--device", "cpu", "--override", "*.linear_proj=fp8"]
    assert main([*arguments, "--export-format", "megatron", "--out", str(out), *TEXT]) == 0
    return out


@pytest.fixture(scope="module")
def qat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qat", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_checkpoint_is_the_model_in_memory(quantized: Path) -> None:
    assert verify_manifest(quantized).kind == "quantized"
    _, memory, exported = (column.metrics for column in read_report(quantized).columns)
    assert memory["kl"] > 0
    assert exported["kl_memory"] == 0
    assert exported["perplexity"] == memory["perplexity"]
    # Weights that train on are not packed; they have the type that was asked for.
    assert exported["bits_per_quantized_weight"] == 16
    assert open_checkpoint(f"megatron:{quantized}").dtype == torch.bfloat16


def test_verify_takes_it(
    quantized: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(quantized), "--against", f"hf:{tiny_model}", *TEXT]) == 0
    assert "is sound" in capsys.readouterr().out


def test_it_is_not_quantized_again(
    arguments: Callable[..., list[str]], quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("run", "--model", f"megatron:{quantized}")) == 2
    assert "slimtron-quant export" in capsys.readouterr().err


def test_a_conversion_does_not_drop_the_quantizers(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slimtron-quant export"):
        plan_conversion(f"megatron:{quantized}", f"hf:{tmp_path / 'out'}")


def test_a_model_without_quantizers_is_not_exported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"hf:{tiny_model}", "--out", str(tmp_path / "out"), *TEXT]) == 2
    assert "--export-format megatron" in capsys.readouterr().err


def test_without_modelopts_state_nothing_is_opened(quantized: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    shutil.rmtree(copy / "weights" / "modelopt_state")
    with pytest.raises(CheckpointError, match="what they belong to is missing"):
        open_checkpoint(f"megatron:{copy}")


def test_it_trains_on_and_exports(
    quantized: Path,
    qat: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, served = tmp_path / "trained", tmp_path / "served"
    arguments = ["--steps", "12", "--lr", "2e-3", "--seq-length", "33", "--num-batches", "2"]
    monkeypatch.setattr(
        sys, "argv", ["qat.py", str(quantized), str(trained), "--device", "cpu", *arguments]
    )
    history = qat.main()
    assert history[-1] < 0.9 * history[0]

    before, after = (_opened(path) for path in (quantized, trained))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"decoder.layers.0.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"} <= changed
    # The scales are those of the calibration.
    assert not any("quantizer" in name for name in changed)

    assert (
        main(["export", f"megatron:{trained}", "--out", str(served), "--device", "cpu", *TEXT]) == 0
    )
    assert read_manifest(served).kind == "quantized"
    checkpoint, exported = (column.metrics for column in read_report(served).columns)
    assert exported["perplexity"] == pytest.approx(checkpoint["perplexity"], rel=0.01)
    formats = {fmt.name for fmt in ExportedModel(served).formats.values()}
    assert formats == {"int4", "fp8"}
    assert main(["verify", str(served), *TEXT]) == 0


def _opened(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(f"megatron:{path}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        return {
            k: v.clone() for k, v in model.state_dict().items() if not k.endswith("_extra_state")
        }


def test_every_weight_learns_through_the_quantizers(quantized: Path, qat: ModuleType) -> None:
    """Rounding has no gradient of its own: it is passed through."""
    checkpoint = open_checkpoint(f"megatron:{quantized}")
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        assert model.decoder.layers[0].mlp.linear_fc1.weight_quantizer.is_enabled
        qat.train(model, [tokens], steps=1, lr=0.0)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.norm()) > 0, name
