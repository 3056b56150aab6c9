from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slimtron_common.errors import CheckpointError
from slimtron_quant.mixed.sensitivity import (
    CandidateSensitivity,
    Sensitivity,
)

GROUP = "decoder.layers.0.mlp.linear_fc1"
EXPECTED = Sensitivity(
    model={"fingerprint": "a", "parameters": 3},
    text={"fingerprint": "b", "num_tokens": 64},
    candidates={"fp8": CandidateSensitivity(recipe="c", divergence={})},
)
FOUND = replace(
    EXPECTED,
    candidates={
        "fp8": CandidateSensitivity(recipe="c", divergence={GROUP: 0.25}),
        "int4": CandidateSensitivity(recipe="d", divergence={GROUP: 0.5}),
    },
)


def test_the_file_says_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(FOUND.to_json())
    assert Sensitivity.read(path) == FOUND
    # More candidates than are asked for do no harm.
    FOUND.check(EXPECTED, {GROUP: ["fp8", "none"]}, where=path)
    assert FOUND.harm(GROUP, "fp8") == 0.25
    assert FOUND.harm(GROUP, "none") == 0


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (replace(FOUND, model={"fingerprint": "x", "parameters": 3}), "another model"),
        (replace(FOUND, text={"fingerprint": "b", "num_tokens": 32}), "another text"),
        (
            replace(FOUND, candidates={"fp8": replace(FOUND.candidates["fp8"], recipe="x")}),
            "another recipe fp8",
        ),
        (replace(FOUND, candidates={}), "not measured"),
        (replace(FOUND, candidates=EXPECTED.candidates), GROUP),
    ],
)
def test_what_was_measured_elsewhere_is_refused(found: Sensitivity, what: str) -> None:
    with pytest.raises(CheckpointError) as error:
        found.check(EXPECTED, {GROUP: ["fp8", "none"]}, where=Path("sensitivity.json"))
    assert what in str(error.value)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1, "candidates": {"fp8": 3}}',
     '{"version": 1, "candidates": {}, "model": {}, "text": {}, "more": 1}'],
)  # fmt: skip
def test_malformed_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(content)
    with pytest.raises(CheckpointError) as error:
        Sensitivity.read(path)
    assert str(path) in str(error.value)


def test_the_file_is_json_for_people(tmp_path: Path) -> None:
    tree = json.loads(FOUND.to_json())
    assert list(tree) == ["version", "model", "text", "candidates"]
    assert tree["candidates"]["fp8"] == {"recipe": "c", "divergence": {GROUP: 0.25}}
