"""The whole job on a tiny model, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimtron_common.manifest import verify_manifest
from slimtron_common.report import read_report
from slimtron_common.testing.models import write_tiny_model
from slimtron_quant.__main__ import main

Arguments = Callable[..., list[str]]


def run(model: Path, out: Path, *more: str) -> int:
    return main(
        [
            *("run", "--model", f"hf:{model}", "--recipe", "fp8", "--out", str(out)),
            *("--data", "pydoc", "--calib-size", "4", "--calib-seq-len", "32"),
            *("--calib-batch-size", "2", "--eval-tokens", "192", "--eval-seq-len", "32"),
            *("--device", "cpu", *more),
        ]
    )


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(tiny_model, out, "--max-perplexity-increase", "500%") == 0
    return out


def test_output_is_complete_and_the_work_directory_gone(finished: Path, tiny_model: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {
        *("config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"),
        *("report.json", "report.html", "slimtron.json"),
    }
    assert [path.name for path in finished.parent.iterdir()] == ["out"]
    manifest = verify_manifest(finished)
    assert manifest.kind == "quantized"
    assert manifest.metrics["perplexity"] > 1


def test_report_compares_original_memory_and_export(finished: Path) -> None:
    original, memory, exported = read_report(finished).columns
    assert original.metrics["kl"] == 0
    assert 0 < memory.metrics["kl"] < 0.2
    assert exported.metrics["kl_memory"] < memory.metrics["kl"]
    assert exported.metrics["weight_bytes"] == (finished / "model.safetensors").stat().st_size
    # 8 bits for the linear layers, 16 for the embedding: between the two.
    assert 8 < exported.metrics["bits_per_weight"] < 16 < original.metrics["bits_per_weight"]


def test_a_missed_gate_keeps_the_output(
    tiny_model: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(tiny_model, out, "--min-agreement", "100%") == 3
    assert "of the tokens agree, wanted are 100.00%" in caplog.text
    verify_manifest(out)
    assert read_report(out).facts["Quality gate"].startswith("missed: ")
    assert read_report(finished).facts["Quality gate"] == "passed"


@pytest.mark.parametrize("recipe", ["fp8", "int8_sq", "int4_awq"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma", "nemotron"])
def test_families(recipe: str, family: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", family)
    out = tmp_path / "out"
    # Random layers amplify what rounding the rest to bfloat16 changes.
    more = ("--block-size", "auto", "--calib-size", "16", "--export-dtype", "32")
    if family == "qwen3_moe":
        more += ("--calibrate-all-experts", "--min-expert-tokens", "400")
    assert run(model, out, "--recipe", recipe, *more) == 0
    report = read_report(out)
    exported = report.columns[-1].metrics
    assert exported["kl_memory"] < 1e-4
    assert 0 < exported["kl"] < 1
    if family in ("mixtral", "qwen3_moe"):
        table = report.tables[-1]
        assert table.title == "Calibration tokens of each expert"
        assert [row[0] for row in table.rows] == [0, 1, 2, 3]
        # 512 tokens go to 2 of 4 experts each.
        assert all(fewest <= 256 <= most for _, fewest, _, most, _, _ in table.rows)
        fact = report.facts["Experts calibrated on"]
        assert fact.startswith("every token" if family == "qwen3_moe" else "as routed; ")


def test_export_announces_itself_to_engines(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    quantization = json.loads((finished / "hf_quant_config.json").read_text())["quantization"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_algo"] == quantization["quant_algo"] == "FP8"
    assert config["torch_dtype"] == "bfloat16"
    with safe_open(finished / "model.safetensors", "pt") as file:
        name = "model.layers.0.self_attn.q_proj"
        assert file.get_tensor(f"{name}.weight").dtype == torch.float8_e4m3fn
        assert file.get_tensor(f"{name}.weight_scale").shape == ()
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_verify_accepts_it_and_measures_against_the_original(
    finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            *("verify", str(finished), "--against", f"hf:{tiny_model}"),
            *("--eval-tokens", "192", "--eval-seq-len", "32"),
        ]
    )
    assert code == 0
    shown = capsys.readouterr().out
    assert "is sound" in shown
    assert "KL" in shown


def test_report_prints_one_and_two(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished)]) == 0
    assert "Perplexity" in capsys.readouterr().out
    assert main(["report", str(finished), str(finished / "report.json")]) == 0


def _change(
    finished: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy without its manifest (which would tell) whose tensors were tampered with."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in finished.iterdir():
        if path.name not in ("slimtron.json", "model.safetensors"):
            (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(finished / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


_Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{_Q}.weight_scale"), "weight_scale"),
        (lambda t: t.update({f"{_Q}.weight_scale": torch.tensor(0.0)}), "positive"),
        (lambda t: t.update({f"{_Q}.input_scale": torch.tensor(float("nan"))}), "positive"),
        (lambda t: t.update({f"{_Q}.weight": t[f"{_Q}.weight"][:32].clone()}), "(32, 64)"),
        (lambda t: t.update({f"{_Q}.weight": t[f"{_Q}.weight"].to(torch.bfloat16)}), "bfloat16"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update({"surprise": torch.ones(1)}), "surprise"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), "not finite"),
        (lambda t: t.update({f"{_Q}.weight_scale": torch.tensor(1e9)}), "proportion"),
        (lambda t: t.update({f"{_Q}.pre_quant_scale": torch.ones(64)}), "no place in the format"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64)}), "F32"),
    ],
)
def test_verify_refuses_what_is_not_as_announced(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    copy = _change(finished, tmp_path, change)
    assert main(["verify", str(copy), "--eval-tokens", "64", "--eval-seq-len", "32"]) == 2
    assert said in capsys.readouterr().err


def test_verify_compares_the_bits_with_the_config(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _change(finished, tmp_path, lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(copy)]) == 2
    assert "8 bits for a weight" in capsys.readouterr().err


def test_verify_notices_a_changed_byte(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _change(finished, tmp_path, lambda tensors: None)
    data = bytearray((finished / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    (copy / "slimtron.json").write_bytes((finished / "slimtron.json").read_bytes())
    assert main(["verify", str(copy)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["int8", "int8_sq", "int4", "int4_awq"])
def test_other_recipes_run_to_the_end(recipe: str, arguments: Arguments, tmp_path: Path) -> None:
    assert main(arguments("run", "--recipe", recipe, "--block-size", "16")) == 0
    _, memory, exported = read_report(tmp_path / "out").columns
    assert memory.metrics["perplexity"] == pytest.approx(exported.metrics["perplexity"], rel=0.01)
    assert memory.metrics["kl"] > 0


def test_a_yaml_file_says_the_same_as_flags(
    arguments: Arguments, tiny_model: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"""
        model: hf:{tiny_model}
        device: cpu
        quantization:
          algorithm: int4
          awq_block_size: auto
          exclude: ["*.linear_fc2"]
        evaluation: {{source: pydoc, num_tokens: 192, seq_length: 32}}
        export: {{path: {tmp_path / "out"}, dtype: "32"}}
        """
    )
    assert main(["run", str(job), "--set", "evaluation.num_tokens=64"]) == 0
    report = read_report(tmp_path / "out")
    assert report.columns[0].metrics["num_tokens"] == 62
    formats = {row[0]: row[1] for row in report.tables[0].rows}
    assert formats["decoder.layers.0.mlp.linear_fc2"] == "as it was"
    assert formats["decoder.layers.1.mlp.linear_fc1"] == "int4"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight").dtype == torch.float32
