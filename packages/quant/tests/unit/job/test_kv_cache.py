"""Jobs that quantize the KV cache, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimtron_common.report import read_report
from slimtron_common.testing.models import write_tiny_model
from slimtron_quant.__main__ import main
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.quantizer import Quantizer

Arguments = Callable[..., list[str]]

SCALES = {
    f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"
    for layer in range(2)
    for kind in "kv"
}


def test_alone_it_leaves_the_weights(
    arguments: Arguments, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = arguments("run", "--recipe", "none", "--kv-cache", "fp8", "--export-dtype", "32")
    assert main(command) == 0
    assert "kv cache   fp8, 128 where there were 512 bytes a token" in capsys.readouterr().out
    written, original = (
        load_file(out / "model.safetensors"),
        load_file(tiny_model / "model.safetensors"),
    )
    assert written.keys() - original.keys() == SCALES
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())
    before, memory, exported = read_report(out).columns
    assert exported.metrics["bits_per_weight"] == 32
    assert before.metrics["bits_per_weight"] == pytest.approx(32, rel=0.02)
    assert exported.metrics["bits_per_quantized_weight"] is None
    # What rounding keys and values brought is in the files: nothing else was changed.
    assert memory.metrics["kl"] > 1e-5
    assert exported.metrics["kl"] == pytest.approx(memory.metrics["kl"], rel=0.2)
    assert exported.metrics["kl_memory"] < 0.1 * memory.metrics["kl"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert (config["quant_algo"], config["ignore"]) == ("FP8", ["*"])
    report = read_report(out)
    assert report.facts["Quantized"] == "none of 8 layers"
    assert report.tables[1].rows == ((0, 1.0, 1.0), (1, 1.0, 1.0))
    assert main(["verify", str(out), "--eval-tokens", "64", "--eval-seq-len", "32"]) == 0
    assert "is sound" in capsys.readouterr().out


def test_with_weights(arguments: Arguments, tmp_path: Path) -> None:
    assert main(arguments("run", "--kv-cache", "fp8", "--calib-size", "8")) == 0
    _, memory, exported = read_report(tmp_path / "out").columns
    assert exported.metrics["kl_memory"] < memory.metrics["kl"]
    model = ExportedModel(tmp_path / "out")
    assert {fmt.name for fmt in model.formats.values()} == {"fp8"}
    # The scales of the cache are no part of the weights.
    q_proj, k_proj = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    scales = 2 * 32
    assert model.stored_bits(q_proj) == 8 * model.read(q_proj).numel() + scales
    assert model.stored_bits(k_proj) == 8 * model.read(k_proj).numel() + scales


def test_keys_beyond_fp8_get_a_larger_scale(arguments: Arguments, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1000
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    command = arguments("run", "--recipe", "int4", "--block-size", "16", "--kv-cache", "fp8")
    assert main([*command, "--model", f"hf:{model}"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    large = written.pop("model.layers.1.self_attn.k_proj.k_scale")
    assert large > 1.5
    assert all(written[name] == 1 for name in SCALES & written.keys())


def test_a_resumed_run_has_the_scales(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments("run", "--recipe", "int8_sq", "--kv-cache", "fp8")
    with monkeypatch.context() as patch:
        patch.setattr("slimtron_quant.job.run.write_export", lambda *_, **__: exec("raise OSError"))
        assert main(command) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Quantizer, "quantize", lambda *_: pytest.fail("calibrated again"))
        assert main([*command, "--resume"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() > SCALES


_KEYS = "model.layers.1.self_attn.k_proj.k_scale"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(_KEYS), _KEYS),
        (lambda t: t.update({_KEYS: torch.tensor(-1.0)}), "positive"),
        (lambda t: t.update({_KEYS: torch.ones(2)}), "(2,)"),
        (lambda t: t.update({_KEYS: torch.tensor(1.0).bfloat16()}), "bfloat16"),
        (lambda t: t.update({_KEYS.replace("1", "2"): torch.tensor(1.0)}), "layers.2"),
    ],
)
def test_verify_refuses_other_scales(
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
    cached: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in cached.iterdir():
        if path.name not in ("slimtron.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(cached / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["verify", str(tmp_path), "--eval-tokens", "64", "--eval-seq-len", "32"]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def cached(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "out"
    command = ["run", "--model", f"hf:{tiny_model}", "--recipe", "none", "--kv-cache", "fp8"]
    text = ["--data", "pydoc", "--calib-size", "2", "--calib-seq-len", "32"]
    evaluation = ["--calib-batch-size", "2", "--eval-tokens", "64", "--eval-seq-len", "32"]
    assert main([*command, *text, *evaluation, "--out", str(out), "--device", "cpu"]) == 0
    return out


def test_verify_refuses_files_that_disagree(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in cached.iterdir():
        if path.name != "slimtron.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(tmp_path)]) == 2
    assert "disagree on kv_cache_scheme" in capsys.readouterr().err


def test_the_plan_says_what_it_saves(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("plan", "--recipe", "int4", "--block-size", "16")) == 0
    shown = capsys.readouterr().out
    assert "as it was, 256 bytes a token" in shown
    assert "none needed" in shown
    command = arguments("plan", "--recipe", "int4", "--block-size", "16", "--kv-cache", "fp8")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "fp8, 128 where there were 256 bytes a token" in shown
    assert "none needed" not in shown
