"""Mixed precision through the command, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.report import read_report
from slimtron_common.testing import write_tiny_model
from slimtron_quant.__main__ import main
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.job import sensitivity as stage

Arguments = Callable[..., list[str]]

BLOCKS = ("--block-size", "auto")


def formats(out: Path) -> dict[str, str]:
    return {str(row[0]): str(row[1]) for row in read_report(out).tables[0].rows}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    command = [
        *("run", "--model", f"hf:{tiny_model}", "--out", str(out), "--bits", "6", *BLOCKS),
        *("--data", "pydoc", "--calib-size", "4", "--calib-seq-len", "32"),
        *("--calib-batch-size", "2", "--eval-tokens", "192", "--eval-seq-len", "32"),
        *("--eval-batch-size", "2", "--device", "cpu"),
    ]
    assert main(command) == 0
    return out


def test_the_budget_is_met_and_used(finished: Path) -> None:
    exported = ExportedModel(finished)
    linear = [module for module in exported.formats if module != "lm_head"]
    bits = sum(exported.stored_bits(f"{module}.weight") for module in linear)
    weights = sum(exported._shapes[f"{module}.weight"][0] * exported._shapes[f"{module}.weight"][1]
                  for module in linear)  # fmt: skip
    assert 5.5 < bits / weights <= 6
    assert f"takes {bits / weights:.3f} bits" in read_report(finished).facts["Budget"]


def test_the_sensitive_layers_got_more(finished: Path) -> None:
    report, measured = (
        read_report(finished),
        json.loads((finished / "sensitivity.json").read_text()),
    )
    harm = measured["candidates"]["int4_awq"]["divergence"]
    chosen = {str(row[0]): row[1] for row in report.tables[1].rows}
    assert set(chosen) == set(harm)
    assert set(chosen.values()) == {"int4_awq", "fp8"}
    assert chosen[max(harm, key=lambda name: harm[name])] == "fp8"
    assert {name: {"int4": "int4_awq"}.get(fmt, fmt) for name, fmt in formats(finished).items()
            if name in chosen} == chosen  # fmt: skip
    assert [plot.title for plot in report.plots[:2]] == [
        "Sensitivity to int4_awq",
        "Sensitivity to fp8",
    ]


def test_engines_are_told_every_layer(finished: Path) -> None:
    quantization = json.loads((finished / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    algorithms = {layer: entry["quant_algo"] for layer, entry in
                  quantization["quantized_layers"].items()}  # fmt: skip
    assert set(algorithms.values()) == {"W4A16_AWQ", "FP8"}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({algorithms[f"{attention}.{x}_proj"] for x in "qkv"}) == 1
        assert algorithms[f"{mlp}.gate_proj"] == algorithms[f"{mlp}.up_proj"]


def test_another_budget_measures_nothing(
    finished: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(stage, "measure_groups", never)
    saved = ("--sensitivity", str(finished / "sensitivity.json"))
    assert main(arguments("plan", "--size", "0.12MB", *BLOCKS, *saved)) == 0
    assert "8 groups of layers" in capsys.readouterr().out
    assert main(arguments("run", "--size", "0.12MB", *BLOCKS, *saved)) == 0
    out = tmp_path / "out"
    size = (out / "model.safetensors").stat().st_size
    assert 105_000 < size <= 120_000
    assert "as it was" in formats(out).values()
    assert "chosen to stay" in read_report(out).facts["As it was"]
    assert (out / "sensitivity.json").read_text() == (finished / "sensitivity.json").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--calib-size", "5"), "another text"),
        (("--sensitivity-tokens", "64"), "another text"),
        (("--block-size", "16", "--bits", "8"), "another recipe int4_awq"),
        (("--candidates", "int4,fp8"), "another recipe int4"),
    ],
)
def test_sensitivities_of_something_else_are_refused(
    more: tuple[str, ...],
    said: str,
    finished: Path,
    arguments: Arguments,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = ("--sensitivity", str(finished / "sensitivity.json"))
    assert main(arguments("run", "--bits", "6", *BLOCKS, *saved, *more)) == 2
    assert said in capsys.readouterr().err


def test_another_model_is_refused(
    finished: Path, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_model(
        tmp_path / "other", seed=1, num_hidden_layers=2, tie_word_embeddings=True
    )
    saved = ("--sensitivity", str(finished / "sensitivity.json"))
    command = arguments("run", "--model", f"hf:{other}", "--bits", "6", *BLOCKS, *saved)
    assert main(command) == 2
    assert "another model" in capsys.readouterr().err


def test_a_measured_candidate_is_not_measured_again(
    finished: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = stage.measure_groups, []

    def count(*args: Any, description: str) -> dict[str, float]:
        calls.append(description)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, description=description)

    monkeypatch.setattr(stage, "measure_groups", count)
    command = arguments("run", "--bits", "6", *BLOCKS)
    assert main(command) == 130
    assert main([*command, "--resume"]) == 0
    assert calls == ["sensitivity to int4_awq", *["sensitivity to fp8"] * 2]
    for name in ("sensitivity.json", "model.safetensors", "hf_quant_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


def test_experts_get_one_format(arguments: Arguments, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "mixtral", num_hidden_layers=2)
    more = ("--candidates", "fp8,none", "--bits", "11", "--calib-size", "16")
    assert main(arguments("run", "--model", f"hf:{model}", *more)) == 0
    found = formats(tmp_path / "out")
    by_layer = [
        {fmt for name, fmt in found.items() if f"layers.{layer}.mlp.experts" in name}
        for layer in range(2)
    ]
    assert all(len(kinds) == 1 for kinds in by_layer)
    assert set().union(*by_layer, found.values()) >= {"fp8", "as it was"}
