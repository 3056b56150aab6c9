"""Checkpoints that NeMo 2.7.3 wrote (``tests/data/nemo2/make.py``), opened without it."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.nemo2 import save_nemo2
from slimtron_common.errors import CheckpointError, SlimtronError, UnsupportedModelError
from slimtron_common.inspection import inspect_checkpoint
from slimtron_common.manifest import verify_manifest
from slimtron_common.models.megatron import build_model
from slimtron_common.models.nemo_classes import nemo_model
from slimtron_common.parallel import ParallelContext, forward_only
from slimtron_common.testing import write_tiny_model

DATA = Path(__file__).parents[2] / "data" / "nemo2"


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "whole", tmp_path / "copy"))


def edit(directory: Path, before: str, after: str) -> None:
    path = directory / "context" / "model.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


@pytest.mark.parametrize("layout", ["whole", "tp2", "pp2"])
def test_logits_are_those_that_nemo_computed(layout: str, context: ParallelContext) -> None:
    checkpoint = open_checkpoint(f"nemo2:{DATA / layout}")
    model = build_model(checkpoint.architecture, context, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    checkpoint.load(model, context)
    expected = torch.load(DATA / "whole.logits.pt", weights_only=True)
    found: list[torch.Tensor] = []
    forward_only(model, [expected["tokens"]], context, lambda _, logits: found.append(logits))
    # The rows that NeMo's padding adds to the vocabulary are gone.
    torch.testing.assert_close(found[0], expected["logits"], rtol=0, atol=1e-5)


def test_what_it_is() -> None:
    checkpoint = open_checkpoint(f"nemo2:{DATA / 'whole'}")
    architecture = checkpoint.architecture
    assert (architecture.family, architecture.vocab_size) == ("llama", 300)
    assert checkpoint.dtype == torch.float32
    assert len(checkpoint.tokenizer()) == 300
    assert {path.name for path in checkpoint.companion_files()} >= {"tokenizer.json"}
    # 384 rows are stored, twice.
    assert checkpoint.weight_bytes == 4 * (checkpoint.num_parameters + 2 * 84 * 32)
    inspection = inspect_checkpoint(f"nemo2:{DATA / 'whole'}")
    assert (inspection.kind, inspection.tokenizer) == ("nemo2", True)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("model.llama.LlamaModel", "model.gemma2.Gemma2Model", "gemma2.Gemma2Model"),
        ("model.llama.LlamaModel", "model.gemma3.Gemma3Model", "gemma3.Gemma3Model"),
        ("model.llama.LlamaModel", "model.starcoder2.Starcoder2Model", "starcoder2.Starcoder2"),
        ("model.llama.LlamaModel", "model.phi3mini.Phi3Model", "phi3mini.Phi3Model"),
        ("model.llama.LlamaModel", "model.ssm.MambaModel", "ssm.MambaModel"),
        ("nemo.collections.llm.gpt.model.llama.LlamaModel", "os.system", "os.system"),
        ("add_bias_linear: false", "add_bias_linear: true", "add_bias_linear True"),
        ("softmax_scale: null", "softmax_scale: 0.5", "softmax_scale 0.5"),
        ("normalization: RMSNorm", "normalization: LayerNorm", "'LayerNorm'"),
        ("model_transform: null", "model_transform: {_target_: LoRA}", "model_transform"),
        ("  fp16: false\n", "  fp16: false\n  scale_factor: 8\n  old_context_len: 4096\n", "4096"),
    ],
)
def test_other_models_are_refused(copy: Path, before: str, after: str, found: str) -> None:
    edit(copy, before, after)
    with pytest.raises(UnsupportedModelError) as refusal:
        open_checkpoint(f"nemo2:{copy}")
    assert found in str(refusal.value)
    assert str(refusal.value.where).endswith("model.yaml")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  hidden_size: 32\n", ""),
        ("config:\n", "configuration:\n"),
        ("  _target_: nemo", "  _target_: !!python/object/apply:os.system ['touch bad']\n  x: n"),
        ("vocab_size: null", "vocab_size: 512"),
    ],
)
def test_a_description_that_is_not_nemos_is_refused(copy: Path, before: str, after: str) -> None:
    edit(copy, before, after)
    with pytest.raises(CheckpointError, match=r"model\.yaml"):
        open_checkpoint(f"nemo2:{copy}")
    assert not Path("bad").exists()


def test_pickles_of_the_context_are_never_opened(
    copy: Path, tmp_path: Path, context: ParallelContext
) -> None:
    trap = tmp_path / "trap"
    for path in (copy / "context" / "model.pkl", copy / "weights" / "common.pt"):
        path.write_bytes(pickle.dumps(Hostile(trap)))
    (copy / "context" / "io.json").write_text(json.dumps({"_target_": "os.system"}))
    checkpoint = open_checkpoint(f"nemo2:{copy}")
    model = build_model(checkpoint.architecture, context, dtype=torch.float32)
    # Megatron-Core 0.19 opens common.pt, and refuses it.
    with contextlib.suppress(SlimtronError):
        checkpoint.load(model, context)
    assert not trap.exists()


def resolved(value: Any, objects: dict[str, Any]) -> Any:
    """A part of an ``io.json`` with what it refers to in its place."""
    if isinstance(value, dict):
        if value.get("type") == "ref":
            return resolved(objects[value["key"]], objects)
        return {k: resolved(v, objects) for k, v in value.items() if k != "paths"}
    return [resolved(item, objects) for item in value] if isinstance(value, list) else value


def part(directory: Path, path: str) -> Any:
    described = json.loads((directory / "context" / "io.json").read_text())
    assert described.keys() == {"root", "objects", "refcounts", "version"}
    objects = described["objects"]
    (found,) = [o for o in objects.values() if path in (o.get("paths") or ())]
    return resolved(found, objects)


@pytest.mark.parametrize("family", ["llama", "gemma", "nemotron", "mistral", "qwen3_moe"])
def test_what_is_written_is_what_nemo_writes(
    family: str, tmp_path: Path, context: ParallelContext
) -> None:
    more: dict[str, Any] = {}
    if family == "llama":
        more["max_position_embeddings"] = 16384
        more["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if family == "mistral":
        more = {"sliding_window": 8}
    write_tiny_model(tmp_path / "hf", family, num_hidden_layers=2, **more)
    source, written = open_checkpoint(f"hf:{tmp_path / 'hf'}"), tmp_path / "nemo"
    model = build_model(source.architecture, context, dtype=torch.float32)
    source.load(model, context)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # One of them without its tokenizer.
    companions = [] if family == "mistral" else source.companion_files()
    save_nemo2(written, model, source.architecture, context, companions=companions)
    again = open_checkpoint(f"nemo2:{written}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    again.load(model, context)
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    plain = {"hf_extras": {}}
    assert replace(again.architecture, **plain) == replace(source.architecture, **plain)
    verify_manifest(written)
    # No pickle but the state that NeMo asks for, which is empty.
    assert torch.load(written / "weights" / "common.pt", weights_only=True) == {}
    names = {"io.json", "model.yaml", *(["nemo_tokenizer"] if companions else [])}
    assert {path.name for path in (written / "context").iterdir()} == names
    nemos = (DATA / "whole" / "weights" / "metadata.json").read_text()
    assert json.loads((written / "weights" / "metadata.json").read_text()) == json.loads(nemos)
    index = (written / "weights" / ".metadata").read_bytes()
    assert b"module.decoder.layers.self_attention.core_attention._extra_state/shard_1_2" in index

    config = dict(part(written, "<root>.model.config")["items"])
    if not companions:
        assert config["Attr(name='vocab_size')"]["value"] == 300
        window = config["Attr(name='window_size')"]
        assert window["type"] == {"type": "pyref", "module": "builtins", "name": "tuple"}
        return
    # NeMo pads the tokenizer's.
    assert config["Attr(name='vocab_size')"]["value"] is None
    assert len(again.tokenizer()) == 300
    tokenizer = part(written, "<root>.model.tokenizer")
    (name,) = tokenizer["items"]
    assert name[1]["value"] == "nemo_tokenizer"
    name[1]["value"] = "hf"
    assert tokenizer == part(DATA / "whole", "<root>.model.tokenizer")


def test_a_model_that_nemos_class_cannot_compute(tmp_path: Path) -> None:
    scaled = replace(open_checkpoint(f"nemo2:{DATA / 'whole'}").architecture, family="qwen2")
    with pytest.raises(UnsupportedModelError, match="only Llamas scale RoPE"):
        nemo_model(replace(scaled, rotary_scaling_factor=8.0), tokenizer=None, vocab_size=None)


def test_without_weights_or_tokenizer(copy: Path) -> None:
    shutil.rmtree(copy / "context" / "hf")
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_checkpoint(f"nemo2:{copy}")
    shutil.rmtree(copy / "weights")
    with pytest.raises(CheckpointError, match="index of the distributed checkpoint is missing"):
        open_checkpoint(f"nemo2:{copy}")
    with pytest.raises(CheckpointError, match=r"holds context/model\.yaml"):
        open_checkpoint(f"nemo2:{copy / 'nothing'}")
