from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slimtron_common.__main__ import main
from slimtron_common.testing import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("[bold]") / "tiny", "mistral", sliding_window=7)


def test_table_tells_what_the_model_is(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"hf:{tiny}"]) == 0
    out = capsys.readouterr().out
    for text in (
        "mistral, 4 layers",
        "4 heads of 16, 2 key/value heads",
        "sliding window 7",
        "embedding",
        "float32",
        "present",
        "1 to 4",
        "not Slimtron",
    ):
        assert text in out
    # A path is no markup.
    assert "[bold]" in out


def test_json_is_for_programs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"hf:{tiny}", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["architecture"]["sliding_window"] == 7
    assert sum(content["parameters"].values()) == content["num_parameters"]


def test_quantized_model_gets_an_answer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "quantized"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", f"hf:{path}"]) == 0
    out = capsys.readouterr().out
    assert "quant_algo FP8" in out
    assert "slimtron-quant verify" in out


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"hf:{tmp_path}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "config.json" in captured.err
