"""Checkpoints that NeMo 2.7.3 wrote (``tests/data/nemo2/make.py``), opened without it."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import CheckpointError, SlimtronError, UnsupportedModelError
from slimtron_common.inspection import inspect_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only

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
    assert inspect_checkpoint(f"nemo2:{DATA / 'whole'}").kind == "nemo2"


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("model.llama.LlamaModel", "model.gemma2.Gemma2Model", "gemma2.Gemma2Model"),
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


def test_without_weights_or_tokenizer(copy: Path) -> None:
    shutil.rmtree(copy / "context" / "hf")
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_checkpoint(f"nemo2:{copy}")
    shutil.rmtree(copy / "weights")
    with pytest.raises(CheckpointError, match="index of the distributed checkpoint is missing"):
        open_checkpoint(f"nemo2:{copy}")
    with pytest.raises(CheckpointError, match=r"holds context/model\.yaml"):
        open_checkpoint(f"nemo2:{copy / 'nothing'}")
