"""A model that is loaded layer by layer computes what the whole model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import Checkpoint, open_checkpoint, save_megatron
from slimtron_common.errors import CheckpointError
from slimtron_common.layerwise import LayerwiseModel, LayerwisePass, hidden_state_bytes
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model

LAYERS = 3
# The last batch is shorter.
BATCHES = torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(3)).split(2)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def logits_of(model: Any, context: ParallelContext) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    forward_only(model, BATCHES, context, lambda i, logits: found.update({i: logits.clone()}))
    return [found[index] for index in range(len(BATCHES))]


def loader(checkpoint: Checkpoint, context: ParallelContext) -> Callable[[int | None], Any]:
    def load(layer: int | None) -> Any:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32, layer=layer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        checkpoint.load(model, context)
        return model

    return load


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma", {}),
        ("nemotron", {}),
        ("qwen3_moe", {}),
        ("mistral", {"sliding_window": 7}),
    ],
)
def test_logits_are_equal_to_the_last_bit(
    family: str, more: dict[str, Any], tmp_path: Path, context: ParallelContext
) -> None:
    path = write_tiny_model(
        tmp_path / "model", family, num_hidden_layers=LAYERS, tokenizer=False, **more
    )
    load = loader(open_checkpoint(f"hf:{path}"), context)
    layered = LayerwiseModel(load, num_layers=LAYERS, directory=tmp_path / "states")
    expected, found = logits_of(load(None), context), logits_of(layered, context)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not (tmp_path / "states").exists()
    assert [layer.decoder.layers[0].layer_number for layer in layered.layers()] == [1, 2, 3]


def test_layers_of_a_distributed_checkpoint(tmp_path: Path, context: ParallelContext) -> None:
    path = write_tiny_model(tmp_path / "model", num_hidden_layers=LAYERS, tokenizer=False)
    source = open_checkpoint(f"hf:{path}")
    whole = loader(source, context)(None)
    save_megatron(tmp_path / "saved", whole, source.architecture, context)
    load = loader(open_checkpoint(f"megatron:{tmp_path / 'saved'}"), context)
    layered = LayerwiseModel(load, num_layers=LAYERS, directory=tmp_path / "states")
    expected, found = logits_of(whole, context), logits_of(layered, context)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    index = tmp_path / "saved/weights/.metadata"
    index.write_bytes(index.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="index"):
        load(1)


def test_a_pass_goes_on_where_it_stopped(tmp_path: Path, context: ParallelContext) -> None:
    path = write_tiny_model(tmp_path / "model", num_hidden_layers=LAYERS, tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{path}")
    load, states = loader(checkpoint, context), tmp_path / "states"
    text = LayerwisePass(states, BATCHES, context, num_layers=LAYERS)
    assert text.next_layer == 0
    text.run(load(0), 0)
    assert text.next_layer == 1
    on_disk = sum(file.stat().st_size for file in states.rglob("*.hidden-states"))
    assert 2 * on_disk == hidden_state_bytes(5 * 24, checkpoint.architecture, torch.float32)

    text.run(load(1), 1)
    # Killed while it wrote: there is no description yet.
    (states / "00002/tp0-cp0-dp0.json").unlink()
    again = LayerwisePass(states, BATCHES, context, num_layers=LAYERS)
    assert again.next_layer == 1
    layered = LayerwiseModel(load, num_layers=LAYERS, directory=states)
    expected, found = logits_of(load(None), context), logits_of(layered, context)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_damaged_states_are_refused(tmp_path: Path, context: ParallelContext) -> None:
    path = write_tiny_model(tmp_path / "model", num_hidden_layers=LAYERS, tokenizer=False)
    load = loader(open_checkpoint(f"hf:{path}"), context)
    text = LayerwisePass(tmp_path / "states", BATCHES, context, num_layers=LAYERS)
    text.run(load(0), 0)
    file = next((tmp_path / "states").rglob("*.hidden-states"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="hidden states are truncated"):
        text.run(load(1), 1)
