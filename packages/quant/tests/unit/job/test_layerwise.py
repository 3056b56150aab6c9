"""Jobs that hold one layer at a time write what others write, and go on where they stopped."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint, save_megatron
from slimtron_common.config import build_config
from slimtron_common.layerwise import LayerwisePass
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import read_report
from slimtron_common.testing import write_tiny_model
from slimtron_quant.__main__ import main
from slimtron_quant.job import model, run
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.preflight import preflight
from slimtron_quant.quantizer import Quantizer

Arguments = Callable[..., list[str]]

LAYERS = 3
JOB_FILES = {"report.json", "report.html", "slimtron.json"}
"""They hold the setting and the plan."""


def weights(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name not in JOB_FILES
    }


def check_same(layerwise: Path, whole: Path) -> None:
    assert weights(layerwise) == weights(whole)
    one, other = (read_report(path) for path in (layerwise, whole))
    assert "one layer at a time" in one.facts["Memory"]
    assert replace(one, facts={}) == replace(other, facts={})
    assert {**one.facts, "Memory": ""} == {**other.facts, "Memory": ""}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("models") / "three", num_hidden_layers=LAYERS, dtype="bfloat16"
    )


@pytest.fixture
def smoothquant(arguments: Arguments, three_layers: Path) -> list[str]:
    return [
        *arguments("run", "--model", f"hf:{three_layers}", "--recipe", "int8_sq"),
        "--layerwise",
    ]


@pytest.fixture(scope="module")
def undisturbed(three_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the job writes with all layers in memory."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    job = ["run", "--model", f"hf:{three_layers}", "--recipe", "int8_sq", "--out", str(out)]
    text = ["--data", "pydoc", "--calib-size", "4", "--calib-seq-len", "32"]
    sizes = ["--calib-batch-size", "2", "--eval-tokens", "192", "--eval-seq-len", "32"]
    assert main([*job, *text, *sizes, "--eval-batch-size", "2", "--device", "cpu"]) == 0
    return weights(out)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ("--recipe", "fp8", "--kv-cache", "fp8")),
        ("llama", ("--recipe", "int4_awq", "--block-size", "16", "--dtype", "bfloat16")),
        ("nemotron", ("--recipe", "int4", "--block-size", "16", "--exclude", "*layers.1.mlp*")),
        ("qwen3_moe", ("--recipe", "w4a8_awq", "--block-size", "16", "--min-expert-tokens", "9")),
        ("gemma", ("--recipe", "none", "--kv-cache", "fp8")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_the_export_has_the_same_bytes(
    family: str, flags: tuple[str, ...], arguments: Arguments, three_layers: Path, tmp_path: Path
) -> None:
    source = three_layers
    if family != "llama":
        source = write_tiny_model(tmp_path / "model", family, num_hidden_layers=2)
    chosen = ("--model", f"hf:{source}", *flags)
    for name, more in (("whole", ()), ("layerwise", ("--layerwise",))):
        assert main([*arguments("run", *chosen, out=tmp_path / name), *more]) == 0
    check_same(tmp_path / "layerwise", tmp_path / "whole")
    assert not list(tmp_path.glob("*.work"))


def test_a_distributed_checkpoint_is_read_in_layers(
    arguments: Arguments, three_layers: Path, tmp_path: Path
) -> None:
    with initialize_parallel(device="cpu") as context:
        checkpoint = open_checkpoint(f"hf:{three_layers}")
        whole = build_model(checkpoint.architecture, context, dtype=torch.bfloat16)
        checkpoint.load(whole, context)
        save_megatron(
            tmp_path / "source",
            whole,
            checkpoint.architecture,
            context,
            companions=checkpoint.companion_files(),
        )
    chosen = ("--model", f"megatron:{tmp_path / 'source'}", "--layerwise")
    assert main(arguments("run", *chosen, out=tmp_path / "layerwise")) == 0
    assert main(arguments("run", "--model", f"hf:{three_layers}", out=tmp_path / "whole")) == 0
    assert weights(tmp_path / "layerwise") == weights(tmp_path / "whole")


def test_one_layer_at_a_time_is_in_memory(
    smoothquant: list[str],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whenever a layer is built, the weights of those before are gone."""
    seen: list[weakref.ref[torch.Tensor]] = []
    built = 0

    def build(*args: Any, **kwargs: Any) -> Any:
        nonlocal built
        gc.collect()
        assert not [ref for ref in seen if ref() is not None]
        layer = build_model(*args, **kwargs)
        built += 1
        assert len(layer.decoder.layers) == 1
        seen[:] = [weakref.ref(parameter) for parameter in layer.parameters()]
        return layer

    monkeypatch.setattr(model, "build_model", build)
    monkeypatch.setattr("slimtron_quant.export.reader.build_model", build)
    assert main(smoothquant) == 0
    # Original, calibration, quantized, export, exported.
    assert built == 5 * LAYERS
    assert weights(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("passes", range(4))
def test_a_job_that_stops_in_a_layer_goes_on_with_it(
    passes: int,
    smoothquant: list[str],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In each pass over the text in turn; what was done is not done again."""
    done: list[int] = []
    advance, quantize = LayerwisePass.run, Quantizer.quantize
    stops_at = passes * LAYERS + 1
    calibrated = 0

    def stop(self: LayerwisePass, layer_model: Any, layer: int, on_logits: Any = None) -> None:
        if len(done) == stops_at:
            raise KeyboardInterrupt
        advance(self, layer_model, layer, on_logits)
        done.append(layer)

    def count(self: Quantizer, *args: Any) -> Any:
        nonlocal calibrated
        calibrated += 1
        return quantize(self, *args)

    monkeypatch.setattr(LayerwisePass, "run", stop)
    monkeypatch.setattr(Quantizer, "quantize", count)
    assert main(smoothquant) == 130
    assert not (tmp_path / "out").exists()
    stops_at = -1
    assert main([*smoothquant, "--resume"]) == 0
    assert done == [*range(LAYERS)] * 4
    assert calibrated == LAYERS + (passes == 1)
    assert weights(tmp_path / "out") == undisturbed


def test_a_calibration_is_repeated_from_the_states_before_it(
    smoothquant: list[str],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A layer's states are out before its scales are kept: a stop in between loses nothing."""
    saved = 0

    def save(*args: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            raise KeyboardInterrupt
        keep(*args)

    keep = run.save_calibration
    monkeypatch.setattr(run, "save_calibration", save)
    assert main(smoothquant) == 130
    stages = {path.name for path in (tmp_path / "out.work").iterdir() if path.is_dir()}
    assert stages == {"original", "calibration-00000", "calibration-states"}
    assert main([*smoothquant, "--resume"]) == 0
    assert weights(tmp_path / "out") == undisturbed


def test_plan_needs_less_memory_and_more_disk(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(arguments("plan", "--layerwise")) == 0
    assert "one layer at a time" in capsys.readouterr().out
    flags = {
        "model": arguments()[2],
        "export.path": "nowhere",
        "device": "cpu",
        "quantization.algorithm": "int4_awq",
        "quantization.awq_block_size": 16,
        "quantization.calibration_dataset": "pydoc",
        "quantization.calibration_dataset_size": 4,
        "quantization.calibration_seq_len": 64,
        "evaluation.num_tokens": 128,
        "evaluation.seq_length": 64,
    }
    whole, layerwise = (
        preflight(build_config(QuantJobConfig, flags={**flags, "layerwise": on})).estimate
        for on in (False, True)
    )
    # Two layers of equal size; 300 x 64 numbers of embedding, 64 in the final norm.
    embedding = 4 * 300 * 64
    assert layerwise.weights == pytest.approx((whole.weights - embedding) / 2 + embedding, rel=1e-3)
    assert layerwise.statistics == whole.statistics / 2
    assert layerwise.activations == whole.activations
    # 256 tokens of calibration in front of a layer and behind it.
    assert layerwise.disk == whole.disk + 2 * 256 * 64 * 4
