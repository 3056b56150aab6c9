"""Mixed precision on a GPU, with the formats that only a GPU computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtron_common.models.megatron import transformer_engine_available
from slimtron_common.report import read_report
from slimtron_quant.__main__ import main

pytestmark = pytest.mark.model


@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
@pytest.mark.parametrize("candidates", ["nvfp4,fp8,none", "int4_awq,fp8,none"])
def test_the_choice_costs_what_was_expected(
    candidates: str, layer_spec: str, demo_model: Path, tmp_path: Path
) -> None:
    if layer_spec == "transformer_engine" and not transformer_engine_available():
        pytest.skip("Transformer Engine is not installed")
    out = tmp_path / "out"
    code = main(
        [
            *("run", "--model", f"hf:{demo_model}", "--bits", "5", "--out", str(out)),
            *("--candidates", candidates, "--sensitivity-tokens", "2048"),
            *("--data", "pydoc", "--block-size", "auto", "--set", f"layer_spec={layer_spec}"),
            *("--calib-size", "8", "--calib-seq-len", "512", "--calib-batch-size", "2"),
            *("--eval-tokens", "8192", "--eval-batch-size", "2", "--device", "cuda"),
        ]
    )
    assert code == 0
    report = read_report(out)
    expected = float(report.facts["Expected KL divergence"].split()[0])
    print(f"\n{candidates} {layer_spec}: {report.facts['Budget']}; {report.columns[-1].metrics}")
    assert report.columns[-1].metrics["kl"] == pytest.approx(expected, rel=0.3)
