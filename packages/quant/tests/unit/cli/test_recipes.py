from __future__ import annotations

import json

import pytest

from slimtron_quant.__main__ import main
from slimtron_quant.recipes import RECIPES


def test_fits_into_a_hundred_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    for recipe in RECIPES.values():
        for text in (recipe.name, recipe.summary, recipe.accuracy, recipe.engines):
            assert text in shown


def test_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(RECIPES)
    assert rows[0].keys() >= {"hardware", "engines", "accuracy", "needs_calibration", "needs_cuda"}


def test_configs_of_modelopt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--modelopt"]) == 0
    assert "NVFP4_DEFAULT_CFG" in capsys.readouterr().out.splitlines()
    assert main(["recipes", "modelopt:NVFP4_DEFAULT_CFG", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["weight_bits"], row["block_size"], row["needs_cuda"]) == (4, 16, True)


def test_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "fp9"]) == 2
    assert "did you mean fp8" in capsys.readouterr().err
