from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.data import DataConfig, token_dataset
from slimtron_common.errors import (
    CheckpointError,
    ConfigError,
    ParallelismError,
    SlimtronError,
    UnsupportedModelError,
)
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.measure import measure, plan_evaluation
from slimtron_common.parallel import ParallelConfig
from slimtron_common.testing import write_tiny_model

CONFIG = EvaluationConfig(source="pydoc", num_tokens=192, seq_length=64, micro_batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "a", seed=0)
    write_tiny_model(folder / "b", seed=1, dtype="bfloat16")
    write_tiny_model(folder / "larger", vocab_size=320)
    write_tiny_model(folder / "mute", tokenizer=False)
    other = write_tiny_model(folder / "other words", tokenizer=False)
    shorter = write_tiny_model(folder / "shorter", vocab_size=290)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shorter / name, other)
    return folder


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_perplexity_is_that_of_transformers(folder: Path) -> None:
    comparison = measure(plan_evaluation(f"hf:{folder / 'a'}", CONFIG))
    (column,) = comparison.columns
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "a")
    data = DataConfig(source="pydoc", num_tokens=192, seq_length=64)
    tokens = torch.tensor(token_dataset(data, tokenizer).tokens)
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert column.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert column.metrics["num_tokens"] == 3 * 63
    assert column.metrics["num_parameters"] == model.num_parameters()
    assert comparison.title == f"hf:{folder / 'a'}"
    assert comparison.facts["Computed in"] == "float32 on cpu"
    assert not dist.is_initialized()


def test_distance_to_another_model(folder: Path) -> None:
    plan = plan_evaluation(f"hf:{folder / 'b'}", CONFIG, against=f"hf:{folder / 'a'}")
    comparison = measure(plan)
    reference, model = comparison.columns
    assert (reference.name, model.name) == ("reference", "model")
    assert (reference.metrics["kl"], reference.metrics["agreement"]) == (0.0, 1.0)
    assert model.metrics["kl"] > 0.1
    assert 0 <= model.metrics["agreement"] < 1
    assert reference.metrics["bits_per_weight"] == pytest.approx(32, rel=0.05)
    assert model.metrics["bits_per_weight"] == pytest.approx(16, rel=0.05)
    alone = measure(plan_evaluation(f"hf:{folder / 'b'}", CONFIG)).columns[0]
    assert model.metrics["loss"] == alone.metrics["loss"]
    assert comparison.facts["Reference"] == f"hf:{folder / 'a'}"


def test_distance_to_itself_is_zero(folder: Path) -> None:
    spec = f"hf:{folder / 'a'}"
    reference, model = measure(plan_evaluation(spec, CONFIG, against=spec)).columns
    assert model.metrics == reference.metrics


def test_recorded_logits_do_not_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spec = f"hf:{folder / 'a'}"
    measure(plan_evaluation(spec, CONFIG, against=spec))
    assert list(tmp_path.iterdir()) == []


def test_type_can_be_chosen(folder: Path) -> None:
    spec = f"hf:{folder / 'a'}"
    exact, rough = (
        measure(plan_evaluation(spec, CONFIG, dtype=dtype)) for dtype in ("auto", "bfloat16")
    )
    assert rough.facts["Computed in"] == "bfloat16 on cpu"
    losses = [c.columns[0].metrics["loss"] for c in (exact, rough)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def refusals(folder: Path) -> dict[str, tuple[type[SlimtronError], str, dict[str, Any]]]:
    def config(**changes: Any) -> EvaluationConfig:
        return EvaluationConfig(
            **{"source": "pydoc", "num_tokens": 192, "seq_length": 64, **changes}
        )

    short = folder / "short.txt"
    short.write_text("hello")
    return {
        "no text": (ConfigError, "needs text", {"config": config(source=None)}),
        "unknown text": (ConfigError, "known kind", {"config": config(source="a.docx")}),
        "too few tokens": (ConfigError, "fewer tokens", {"config": config(source=str(short))}),
        "too long": (
            ConfigError,
            "longer than the model's positions",
            {"config": config(seq_length=1024, num_tokens=1024)},
        ),
        "too few processes": (
            ParallelismError,
            "needs 2 processes",
            {"parallel": ParallelConfig(tensor_parallel_size=2)},
        ),
        "tensor parallelism": (
            ParallelismError,
            "key/value heads",
            {"parallel": ParallelConfig(tensor_parallel_size=4), "world_size": 4},
        ),
        "pipeline": (
            ParallelismError,
            "4 layers",
            {"parallel": ParallelConfig(pipeline_parallel_size=5), "world_size": 5},
        ),
        "no model": (CheckpointError, "does not exist", {"model": f"hf:{folder / 'none'}"}),
        "no reference": (CheckpointError, "does not exist", {"against": f"hf:{folder / 'none'}"}),
        "malformed reference": (ConfigError, "kind", {"against": "a"}),
        "no tokenizer": (CheckpointError, "no tokenizer", {"model": f"hf:{folder / 'mute'}"}),
        "other vocabulary": (
            UnsupportedModelError,
            "different tokens",
            {"against": f"hf:{folder / 'larger'}"},
        ),
        "other words": (
            UnsupportedModelError,
            "different tokens",
            {"against": f"hf:{folder / 'other words'}"},
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "no text",
        "unknown text",
        "too few tokens",
        "too long",
        "too few processes",
        "tensor parallelism",
        "pipeline",
        "no model",
        "no reference",
        "malformed reference",
        "no tokenizer",
        "other vocabulary",
        "other words",
    ],
)
def test_refused_before_any_weight_is_read(name: str, folder: Path) -> None:
    error, message, changes = refusals(folder)[name]
    arguments: dict[str, Any] = {"model": f"hf:{folder / 'a'}", "config": CONFIG, **changes}
    with pytest.raises(error, match=message) as caught:
        plan_evaluation(arguments.pop("model"), arguments.pop("config"), **arguments)
    assert caught.value.exit_code == 2
    assert not dist.is_initialized()


def test_full_disk_is_refused_before_any_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    spec = f"hf:{folder / 'a'}"
    plan_evaluation(spec, CONFIG)
    with pytest.raises(CheckpointError, match="too little space") as caught:
        plan_evaluation(spec, CONFIG, against=spec)
    assert "TMPDIR" in str(caught.value.hint)


def test_too_few_sequences_for_the_processes_are_refused_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtron_common.evaluation import measure as module

    plan = plan_evaluation(f"hf:{folder / 'a'}", CONFIG)
    monkeypatch.setattr(type(plan.dataset), "batches", _too_few)
    monkeypatch.setattr(module, "build_model", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(ParallelismError, match="fewer sequences"):
        measure(plan)
    assert not dist.is_initialized()


def _too_few(*_: object) -> None:
    raise ParallelismError("there are fewer sequences than data-parallel ranks")


def test_plan_has_read_headers_only(folder: Path) -> None:
    plan = plan_evaluation(f"hf:{folder / 'a'}", CONFIG)
    assert isinstance(plan.model, Checkpoint)
    assert plan.dataset.num_sequences == 3
    assert plan.device in ("cpu", "cuda")
    assert plan.model.architecture == open_checkpoint(f"hf:{folder / 'a'}").architecture
