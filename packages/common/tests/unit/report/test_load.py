from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.errors import CheckpointError
from slimtron_common.report import Column, Comparison, Table, read_report, write_report
from slimtron_common.report.write import to_json


def test_round_trip_is_exact(tmp_path: Path, comparison: Comparison) -> None:
    page = write_report(tmp_path, comparison)
    loaded = read_report(tmp_path)
    # repr tells 1 from 1.0 and True, a list from a tuple, and NaN equals NaN in it.
    assert repr(loaded) == repr(comparison)
    assert repr(read_report(page.with_name("report.json"))) == repr(comparison)
    assert isinstance(loaded.columns[0].metrics["weight_bytes"], int)
    assert math.isnan(loaded.columns[2].metrics["kl"] or 0)


def test_round_trip_of_awkward_values(tmp_path: Path) -> None:
    comparison = Comparison(
        "\ud800 é \x00 \U0001f600",
        (Column("a", {"float": 0.1 + 0.2, "b": 2**70, "c": 5e-324, "d": -0.0, "e": 1e300}),),
        tables=(
            Table("t", ("x",), (("nan",), (math.nan,), (True,), (1,), (1.0,), ("1",), (None,))),
        ),
        facts={"float": "inf"},
    )
    write_report(tmp_path, comparison)
    assert repr(read_report(tmp_path)) == repr(comparison)


def test_missing_report(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(CheckpointError, match="no report can be read: No such file"):
            read_report(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "{}", '{"slimtron_report": 2}', "[" * 100_000, "\udcff"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="is not a report") as caught:
        read_report(file)
    assert str(file) in str(caught.value)


def edit_columns(content: dict[str, Any], value: Any) -> None:
    content["columns"][0]["metrics"]["perplexity"] = value


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("columns"),
        lambda content: content.pop("facts"),
        lambda content: content.update(extra=1),
        lambda content: content.update(title=3),
        lambda content: content.update(columns=[]),
        lambda content: content["columns"].append(content["columns"][0]),
        lambda content: content["columns"][0].update(extra=1),
        lambda content: edit_columns(content, "14"),
        lambda content: edit_columns(content, True),
        lambda content: edit_columns(content, {"__float__": "1.5"}),
        lambda content: edit_columns(content, {"__float__": []}),
        lambda content: edit_columns(content, math.nan),
        lambda content: content["plots"][0].update(kind="pie"),
        lambda content: content["plots"][0]["x"].pop(),
        lambda content: content["plots"][2]["x"].reverse(),
        lambda content: content["tables"][0]["rows"][0].pop(),
        lambda content: content["tables"][0]["rows"][0].__setitem__(0, {}),
        lambda content: content["metrics"][0].update(format="{0.__class__}"),
        lambda content: content.update(slimtron_report=True),
    ],
)
def test_malformed_reports_are_refused(
    tmp_path: Path, comparison: Comparison, damage: Callable[[dict[str, Any]], object]
) -> None:
    content = json.loads(to_json(comparison))
    damage(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        read_report(tmp_path)


def test_the_error_names_the_field(tmp_path: Path, comparison: Comparison) -> None:
    content = json.loads(to_json(comparison))
    content["columns"][1]["name"] = 7
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"columns\.1\.name") as caught:
        read_report(tmp_path)
    assert caught.value.found == 7


def test_every_field_is_written(comparison: Comparison) -> None:
    content = json.loads(to_json(comparison))
    assert content.keys() == {"slimtron_report"} | {
        field.name for field in dataclasses.fields(Comparison)
    }
