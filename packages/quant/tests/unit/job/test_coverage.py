"""A mixed job: every weight is accounted for, in the report and in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from slimtron_common.report import read_report
from slimtron_quant.__main__ import main
from slimtron_quant.cli.job_arguments import add_job_arguments, job_config
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.job.preflight import preflight

Arguments = Callable[..., list[str]]


def test_mixed_formats_are_written_and_accounted_for(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *("--override", "*.linear_fc2=int4", "--override", "decoder.layers.1.self_attention=int8"),
        *("--exclude", "decoder.layers.0.mlp.linear_fc1", "--block-size", "16"),
    ]
    assert main(arguments("run", *flags)) == 0
    shown = capsys.readouterr().out
    report = read_report(tmp_path / "out")
    layers = report.tables[0]
    rows = {str(row[0]): dict(zip(layers.header, row, strict=True)) for row in layers.rows}
    fc1, fc2 = (rows[f"decoder.layers.0.mlp.linear_fc{i}"] for i in (1, 2))
    assert (fc1["format"], fc1["bits each"]) == ("as it was", 16)
    assert fc1["reason"] == "excluded by decoder.layers.0.mlp.linear_fc1"
    # Blocks of 16 with a float32 scale each: 4 + 32 / 16, and a factor of one for each channel.
    assert fc2["format"] == "int4"
    assert 6 <= float(str(fc2["bits each"])) <= 6.3
    assert rows["decoder.layers.1.self_attention.linear_qkv"]["format"] == "int8"
    assert rows["decoder.layers.0.self_attention.linear_qkv"]["format"] == "fp8"
    assert rows["embedding.word_embeddings"]["reason"] == "embedding"
    assert rows["norms and biases"]["format"] == "as it was"

    exported = ExportedModel(tmp_path / "out")
    stored = sum(row["weights"] * row["bits each"] for row in rows.values())  # type: ignore[operator,misc]
    parameters = sum(row["weights"] for row in rows.values())  # type: ignore[misc]
    assert stored / parameters == pytest.approx(exported.bits_per_weight, abs=1e-3)
    metrics = report.columns[-1].metrics
    quantized = [row for row in rows.values() if not row["reason"]]
    bits = sum(row["weights"] * row["bits each"] for row in quantized)  # type: ignore[operator,misc]
    assert metrics["bits_per_quantized_weight"] == pytest.approx(
        bits / sum(row["weights"] for row in quantized),
        abs=1e-3,  # type: ignore[misc]
    )

    fact = report.facts["Quantized"]
    assert "3 layers to fp8, 2 layers to int4, 2 layers to int8, of 8;" in fact
    assert "embedding" in report.facts["As it was"]
    assert fact in shown
    assert report.facts["As it was"] in shown


def test_awq_beside_another_format(arguments: Arguments, tmp_path: Path) -> None:
    flags = ["--recipe", "int4_awq", "--override", "*.linear_fc2=fp8", "--block-size", "16"]
    assert main(arguments("run", *flags)) == 0
    exported = ExportedModel(tmp_path / "out")
    names = {
        module: fmt.name for module, fmt in exported.formats.items() if module.endswith("down_proj")
    }
    assert set(names.values()) == {"fp8"}
    assert len(names) == 2
    # AWQ's factor has no place in front of a layer in FP8.
    factors = [n for n in exported.tensors.names if n.endswith("pre_quant_scale")]
    assert factors
    assert not any("down_proj" in name for name in factors)


def test_nemos_json_file_runs(arguments: Arguments, tmp_path: Path) -> None:
    path = tmp_path / "nemo.json"
    path.write_text(
        '{"quant_cfg": {"*weight_quantizer": {"num_bits": [4, 3], "axis": null},'
        '"*input_quantizer": {"num_bits": [4, 3], "axis": null}, "default": {"enable": false}},'
        '"algorithm": "max"}'
    )
    assert main(arguments("run", "--recipe", str(path))) == 0
    formats = ExportedModel(tmp_path / "out").formats
    assert {fmt.name for fmt in formats.values() if fmt} == {"fp8"}


def test_a_changed_recipe_file_is_another_job(arguments: Arguments, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_job_arguments(parser)
    path = tmp_path / "own.yaml"
    identities = []
    for recipe in ("fp8", "fp8_pc_pt"):
        path.write_text(f"recipe: {recipe}\n")
        args = parser.parse_args(arguments("run", "--recipe", str(path))[1:])
        identities.append(preflight(job_config(args)).identity["recipe"])
    assert identities[0] != identities[1]
