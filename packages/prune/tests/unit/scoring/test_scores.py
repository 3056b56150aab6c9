from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import CheckpointError
from slimtron_common.models import Architecture
from slimtron_prune.scoring.scores import (
    Scores,
    load_scores,
    merge_scores,
    save_scores,
    score_bytes,
    score_shapes,
)


@pytest.fixture
def architecture(tiny_model: Path) -> Architecture:
    return open_checkpoint(f"hf:{tiny_model}").architecture


def ones(architecture: Architecture, value: float = 1.0) -> Scores:
    shapes = score_shapes(architecture)
    return Scores(
        architecture,
        {name: torch.full(shape, value, dtype=torch.float64) for name, shape in shapes.items()},
    )


def test_scores_are_read_as_they_were_written(architecture: Architecture, tmp_path: Path) -> None:
    scores = ones(architecture, 2.0)
    save_scores(tmp_path, scores)
    # Another type of the weights, and other token ids, are no other model.
    same = replace(architecture, dtype="bfloat16", hf_extras={"pad_token_id": 7})
    found = load_scores(tmp_path, same)
    assert found.fingerprint == scores.fingerprint != ones(architecture).fingerprint
    assert found.num_tokens == 2
    total = sum(value.numel() for value in found.sums.values())
    assert score_bytes(architecture) == 8 * total


def test_parts_add_up(architecture: Architecture) -> None:
    merged = merge_scores([ones(architecture, 1.0), ones(architecture, 2.5)])
    assert all(bool((value == 3.5).all()) for value in merged.sums.values())


def test_what_cannot_be_used_is_refused(architecture: Architecture, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no scores"):
        load_scores(tmp_path / "none", architecture)
    with pytest.raises(CheckpointError, match="missing"):
        load_scores(tmp_path, architecture)
    save_scores(tmp_path, ones(architecture))
    with pytest.raises(CheckpointError, match="another model") as caught:
        load_scores(tmp_path, replace(architecture, num_layers=3))
    assert caught.value.found == "num_layers 4"
    file = tmp_path / "scores.safetensors"
    sums = load_file(file)
    save_file({**sums, "ffn": sums["ffn"] * torch.nan}, file)
    with pytest.raises(CheckpointError, match="not finite"):
        load_scores(tmp_path, architecture)
    file.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_scores(tmp_path, architecture)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(CheckpointError, match="of which model"):
        load_scores(tmp_path, architecture)
