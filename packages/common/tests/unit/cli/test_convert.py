from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtron_common.__main__ import main
from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.testing import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer=False)


def test_converts_and_tells_how_close(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert main(["convert", f"hf:{tiny}", f"hf:{target}", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "changed when read back" in out
    assert "changed by rounding the weights" in out
    assert "bfloat16" in out
    assert open_checkpoint(f"hf:{target}").dtype is torch.bfloat16


def test_existing_output_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slimtron.json").touch()
    arguments = ["convert", f"hf:{tiny}", f"hf:{tmp_path / 'out'}", "--dtype", "float16"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "exists already" in captured.err
    assert "--overwrite" in captured.err
    assert captured.out == ""
    assert main([*arguments, "--overwrite"]) == 0


def test_layout_without_its_processes_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", f"hf:{tiny}", f"megatron:{tmp_path / 'out'}", "--pp", "2"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert main(["convert", f"hf:{tiny}", f"megatron:{tmp_path / 'out'}", "--ep", "2"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_types_are_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", f"hf:{tiny}", "hf:out", "--dtype", "int8"])
    assert caught.value.code == 2
    assert "bfloat16" in capsys.readouterr().err
