"""What is refused before any weight loads, with exit code 2."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.manifest import write_manifest
from slimtron_common.models import Architecture
from slimtron_common.testing import write_tiny_model
from slimtron_prune.__main__ import main
from slimtron_prune.scoring.scores import Scores, save_scores, score_shapes

Arguments = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_weight_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("slimtron_prune.job.source.build_model", load)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), ("pruning: there is nothing to prune to", "--target-params")),
        (("--drop-layers", ""), ("pruning.drop_layers: names no layer",)),
        (("--drop-layers", "0"), ("pruning.drop_layers: layers count from 1",)),
        (("--drop-layers", "2,2"), ("names a layer twice",)),
        (("--drop-layers", "5"), ("pruning.drop_layers: the model has no such layer", "1 to 4")),
        (("--drop-layers", "1,2,3,4"), ("no layer would be left",)),
        (("--drop-layers", "1", "--num-layers", "3"), ("excludes the other targets",)),
        (("--num-attention-heads", "2"), ("goes together with target_num_query_groups",)),
        (("--hidden-size", "128"), ("pruning.target_hidden_size", "at most 64")),
        (("--hidden-size", "50"), ("tensor cores", "such as 48")),
        (("--num-moe-experts", "2"), ("the model has no experts",)),
        (("--hidden-size", "48", "--target-ratio", "0.5"), ("a budget leaves the sizes",)),
        (("--target-ratio", "0.5", "--target-params", "1M"), ("one budget is enough",)),
        (("--target-ratio", "1.5"), ("search.target_ratio", "below 1")),
        (("--target-params", "many"), ("search.target_params: is no size",)),
        (("--target-params", "100"), ("no shape within the bounds fits",)),
        (("--target-params", "1G"), ("the model itself fits",)),
        (("--target-ratio", "0.5", "--bound", "depth=1:2"), ("search.bounds.depth",)),
        (("--target-ratio", "0.5", "--bound", "num_layers=5:6"), ("bounds.num_layers",)),
        (("--num-layers", "3", "--score-tokens", "100"), ("scoring.num_tokens",)),
        (("--num-layers", "3", "--score-tokens", "9999968"), ("fewer tokens than asked for",)),
        (("--num-layers", "3", "--score-seq-len", "1024", "--score-tokens", "1024"),
         ("scoring.seq_length", "at most 512")),
        (("--num-layers", "3", "--scores", "nowhere"), ("there are no scores",)),
        (("--num-layers", "3", "--data", "nowhere.txt"), ("nowhere.txt",)),
        (("--num-layers", "3", "--set", "parallel.context_parallel_size=2"), ("parallel",)),
        (("--num-layers", "3", "--tp", "2"), ("needs 2 processes",)),
        (("--set", "pruning.target_hiden_size=48"), ("did you mean target_hidden_size",)),
    ],
)  # fmt: skip
def test_refusals(
    more: tuple[str, ...],
    expected: tuple[str, ...],
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments("run", *more)) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_layouts_of_the_smaller_model(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models are laid out: what the smaller one cannot have is refused, too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    heads = ("--num-attention-heads", "3", "--num-query-groups", "1")
    heads = ("--num-attention-heads", "1", "--num-query-groups", "1")
    assert main(arguments("run", *heads, "--tp", "2")) == 2
    assert "1 attention heads" in capsys.readouterr().err
    assert main(arguments("run", "--num-layers", "1", "--pp", "2")) == 2
    assert "every pipeline stage needs one" in capsys.readouterr().err
    context = ("--set", "parallel.context_parallel_size=2")
    assert main(arguments("run", "--num-layers", "3", *context)) == 2
    assert "opens in any layout" in capsys.readouterr().err
    assert main(arguments("run", "--num-layers", "3", "--ep", "2")) == 2
    assert "this model is dense" in capsys.readouterr().err


def test_layouts_of_experts(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = write_tiny_model(tmp_path / "mixture", "mixtral")
    shared_out = ("--ep", "2", "--model", f"hf:{model}")
    assert main(arguments("run", "--num-moe-experts", "3", *shared_out)) == 2
    assert "divide the model's 3 experts" in capsys.readouterr().err
    odd = ("--score-tokens", "96", "--score-batch-size", "1")
    assert main(arguments("run", "--num-moe-experts", "2", *shared_out, *odd)) == 2
    assert "3 sequences for 2 processes" in capsys.readouterr().err


def test_experts_are_scored_without_tensor_parallelism(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = write_tiny_model(tmp_path / "mixture", "mixtral")
    sizes = ("--num-moe-experts", "2", "--tp", "2", "--model", f"hf:{model}")
    assert main(arguments("run", *sizes)) == 2
    assert "1 for a mixture of experts" in capsys.readouterr().err


def test_what_hybrids_cannot_do(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ("--model", f"hf:{write_tiny_model(tmp_path / 'hybrid', 'nemotron_h')}")

    def refused(*more: str) -> str:
        assert main(arguments("run", *more, *model)) == 2
        return capsys.readouterr().err

    assert "knows transformers alone" in refused("--target-ratio", "0.8")
    assert "no Mamba layer of the hybrid" in refused("--drop-layers", "1,3,5")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "equally many of the hybrid's 5" in refused("--num-layers", "5", "--pp", "2")
        find_spec = importlib.util.find_spec
        patch.setenv("WORLD_SIZE", "1")
        known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        patch.delitem(known, "nemotron_h")
        assert "does not know nemotron_h yet" in refused("--num-layers", "5")
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "einops" else find_spec(name)
        )
        assert "pip install einops" in refused("--num-layers", "5")


def test_scores_of_another_model(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = open_checkpoint(f"hf:{write_tiny_model(tmp_path / 'other', num_hidden_layers=2)}")
    shapes = score_shapes(other.architecture)
    scores = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}
    save_scores(tmp_path, Scores(other.architecture, scores))
    assert main(arguments("run", "--num-layers", "3", "--scores", str(tmp_path))) == 2
    assert "the scores are of another model" in capsys.readouterr().err


def test_scores_of_other_weights(
    arguments: Arguments,
    tiny_model: Path,
    random_scores: Callable[[Architecture], Scores],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = open_checkpoint(f"hf:{tiny_model}")
    (tmp_path / "scores").mkdir()
    save_scores(tmp_path / "scores", random_scores(checkpoint.architecture))
    scored = {**checkpoint.identity, "fingerprint": "of a finetuned copy"}
    write_manifest(
        tmp_path / "scores", kind="scores", config={"model": scored}, metrics={}, seed=None
    )
    command = arguments("run", "--num-layers", "3", "--scores", str(tmp_path / "scores"))
    assert main(command) == 2
    assert "the scores are of other weights" in capsys.readouterr().err


def test_output_in_the_way(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert main(arguments("run", "--num-layers", "3", "--overwrite")) == 2
    assert (tmp_path / "out" / "mine").read_text() == "keep"
