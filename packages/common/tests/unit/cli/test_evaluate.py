from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimtron_common.__main__ import main
from slimtron_common.testing import write_tiny_model

TEXT = ["--data", "pydoc", "--num-tokens", "128", "--seq-length", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "a", seed=0)
    write_tiny_model(folder / "b", seed=1)
    return folder


def test_prints_perplexity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"hf:{folder / 'a'}", *TEXT]) == 0
    out = capsys.readouterr().out
    assert "Perplexity" in out
    assert "KL" not in out


def test_prints_the_distance_to_another_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", f"hf:{folder / 'b'}", "--against", f"hf:{folder / 'a'}", *TEXT]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "KL divergence" in out
    assert "Top-1 agreement" in out
    assert main([*arguments, "--json", "--micro-batch-size", "2"]) == 0
    content = json.loads(capsys.readouterr().out)
    reference, model = content["columns"]
    assert reference["name"] == "reference"
    assert model["metrics"]["kl"] > 0
    assert content["facts"]["Seed"] == "1234"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num-tokens", "100"], "multiple of seq_length"),
        (["--seq-length", "1024", "--num-tokens", "1024"], "longer than the model's positions"),
        (["--tp", "2"], "torchrun"),
        (["--ep", "2"], "torchrun --nproc-per-node 2"),
        (["--data", "nothing.txt"], "nothing.txt"),
        (["--text-field", ""], "text_field"),
        (["--against", "hf:nothing"], "does not exist"),
    ],
)
def test_refuses_early(
    changes: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"hf:{folder / 'a'}", *TEXT, *changes]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
