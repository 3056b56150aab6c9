from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimtron_common.checkpoint import open_checkpoint, save_megatron
from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.manifest import verify_manifest
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only
from slimtron_common.testing import write_tiny_model

TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def build(spec: str, context: ParallelContext, dtype: torch.dtype = torch.float32) -> nn.Module:
    checkpoint = open_checkpoint(spec)
    model = build_model(checkpoint.architecture, context, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    checkpoint.load(model, context)
    return model


def logits_of(model: nn.Module, context: ParallelContext) -> torch.Tensor:
    found: list[torch.Tensor] = []
    forward_only(model, [TOKENS], context, lambda _, logits: found.append(logits.clone()))
    return found[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny", "qwen3", tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def saved(tiny: Path, context: ParallelContext) -> Path:
    # Writing starts processes: once for the whole module.
    path = tiny.with_name("saved")
    checkpoint = open_checkpoint(f"hf:{tiny}")
    save_megatron(
        path,
        build(f"hf:{tiny}", context),
        checkpoint.architecture,
        context,
        companions=checkpoint.companion_files(),
    )
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.function, self.args)


def test_reads_back_what_was_saved(tiny: Path, saved: Path, context: ParallelContext) -> None:
    models = [build(f"hf:{tiny}", context), build(f"megatron:{saved}", context)]
    original, found = (dict(model.named_parameters()) for model in models)
    assert found.keys() == original.keys()
    for name, parameter in original.items():
        assert torch.equal(found[name], parameter), name
    assert torch.equal(logits_of(models[1], context), logits_of(models[0], context))


def test_another_type_is_rounded_to(tiny: Path, saved: Path, context: ParallelContext) -> None:
    models = [build(spec, context, torch.bfloat16) for spec in (f"hf:{tiny}", f"megatron:{saved}")]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert b.dtype is torch.bfloat16
        assert torch.equal(a, b)


def test_what_is_known_before_loading(tiny: Path, saved: Path) -> None:
    original, checkpoint = open_checkpoint(f"hf:{tiny}"), open_checkpoint(f"megatron:{saved}")
    assert checkpoint.kind == "megatron"
    assert checkpoint.architecture == original.architecture
    assert checkpoint.dtype is torch.float32
    assert checkpoint.num_parameters == original.num_parameters
    assert checkpoint.weight_bytes >= 4 * checkpoint.num_parameters
    text = "lambda x: x"
    ids = [c.tokenizer()(text)["input_ids"] for c in (original, checkpoint)]
    assert ids[0] == ids[1]
    manifest = verify_manifest(saved)
    assert manifest.kind == "megatron"
    assert "weights/.metadata" in manifest.files


def test_existing_output_is_kept(saved: Path, tiny: Path, context: ParallelContext) -> None:
    architecture = open_checkpoint(f"hf:{tiny}").architecture
    before = sorted(saved.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        save_megatron(saved, build(f"hf:{tiny}", context), architecture, context)
    assert sorted(saved.rglob("*")) == before


@pytest.mark.parametrize("name", ["weights", "weights/metadata.json", "weights/.metadata"])
def test_unfinished_checkpoint_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(f"megatron:{copy}")


def test_hostile_index_does_not_run(copy: Path, tmp_path: Path) -> None:
    trace, index = tmp_path / "trace", copy / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = Call(os.mkdir, str(trace))
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="would run code"):
        open_checkpoint(f"megatron:{copy}")
    assert not trace.exists()


def test_hostile_common_state_does_not_run(
    copy: Path, tmp_path: Path, context: ParallelContext
) -> None:
    """Megatron-Core keeps it in a file of its own, or since 0.19 among the weights."""
    trace, weights = tmp_path / "trace", copy / "weights"
    payload = tmp_path / "payload.pt"
    torch.save(Call(os.mkdir, str(trace)), payload)
    index = pickle.loads((weights / ".metadata").read_bytes())
    common = [key for key in index.state_dict_metadata if key.startswith("common_state")]
    if common:
        entry = next(v for k, v in index.storage_data.items() if k.fqn in common)
        entry.relative_path, entry.offset = "payload.distcp", 0
        entry.length = payload.stat().st_size
        shutil.copy(payload, weights / "payload.distcp")
        (weights / ".metadata").write_bytes(pickle.dumps(index))
    else:
        shutil.copy(payload, weights / "common.pt")
    refused = pytest.raises(CheckpointError, match="damaged")
    # The file of its own is not even opened.
    with refused if common else contextlib.nullcontext():
        build(f"megatron:{copy}", context)
    assert not trace.exists()


def test_common_state_may_lie_where_another_version_keeps_it(
    saved: Path, copy: Path, context: ParallelContext
) -> None:
    """Up to Megatron-Core 0.16 that is ``common.pt``, since 0.19 among the weights."""
    weights = copy / "weights"
    if (weights / "common.pt").exists():
        (weights / "common.pt").unlink()
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    else:
        torch.save({}, weights / "common.pt")
        config = json.loads((weights / "metadata.json").read_text())
        config.update(common_backend="torch", common_backend_version=1)
    (weights / "metadata.json").write_text(json.dumps(config))
    expected = dict(build(f"megatron:{saved}", context).named_parameters())
    for name, parameter in build(f"megatron:{copy}", context).named_parameters():
        assert torch.equal(parameter, expected[name]), name


def _largest_file(copy: Path) -> Path:
    return max((copy / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)


def test_truncated_weights_are_refused(copy: Path, context: ParallelContext) -> None:
    file = _largest_file(copy)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged") as caught:
        build(f"megatron:{copy}", context)
    assert caught.value.where == copy / "weights"
    assert caught.value.found


def test_missing_weights_are_refused(copy: Path, context: ParallelContext) -> None:
    _largest_file(copy).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        build(f"megatron:{copy}", context)


def test_weights_that_are_no_tensors_are_refused(copy: Path, context: ParallelContext) -> None:
    file = _largest_file(copy)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x" * 200_000)
    with pytest.raises(CheckpointError, match="damaged"):
        build(f"megatron:{copy}", context)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 5}, "damaged or not those of this model"),
        ({"intermediate_size": 128}, "damaged or not those of this model"),
        ({"vocab_size": 310}, "the vocabulary is not that of the weights"),
    ],
    ids=str,
)
def test_config_of_another_model_is_refused(
    copy: Path, changes: dict[str, int], said: str, context: ParallelContext
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=said):
        build(f"megatron:{copy}", context)


def test_config_of_another_family_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config.update(model_type="gpt2", architectures=["GPT2LMHeadModel"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError):
        open_checkpoint(f"megatron:{copy}")
