"""The layouts against Megatron-Core's own definitions, in float64 and by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.families import FAMILIES
from slimtron_common.models.huggingface import architecture_from_config
from slimtron_common.models.layouts import (
    Column,
    Gated,
    Layout,
    Packed,
    QueryKeyValue,
    Row,
    Vocabulary,
)
from slimtron_common.models.mapping import model_parameters
from slimtron_common.testing import write_tiny_model

HIDDEN = 8


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Layout, list[torch.Tensor]]] = {
    "replicated": (Layout(), [randn(HIDDEN)]),
    "column": (Column(), [randn(24, HIDDEN)]),
    "row": (Row(), [randn(HIDDEN, 24)]),
    "vocabulary": (Vocabulary(24), [randn(24, HIDDEN)]),
    "padded vocabulary": (Vocabulary(21), [randn(21, HIDDEN)]),
    "vocabulary with an empty shard": (Vocabulary(4), [randn(4, HIDDEN)]),
    "gated": (Gated(), [randn(24, HIDDEN), randn(24, HIDDEN + 1)[:, :HIDDEN]]),
    "packed": (Packed((24, 12, 36)), [randn(72, HIDDEN)]),
    "multi-head": (QueryKeyValue(12, 1, 2), [randn(24, 3 + i)[:, :3] for i in range(3)]),
    "grouped": (QueryKeyValue(12, 3, 2), [randn(72, 3), randn(24, 3), randn(24, 4)[:, :3]]),
    "bias": (QueryKeyValue(12, 3, 2), [randn(72), randn(24), randn(24) + 1]),
}


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", CASES)
def test_split_undoes_merge(name: str, tp: int) -> None:
    layout, tensors = CASES[name]
    shards = [layout.merge(tensors, rank, tp) for rank in range(tp)]
    # A gather needs shards of one shape.
    assert len({shard.shape for shard in shards}) == 1
    whole = layout.split(shards)
    assert len(whole) == len(tensors)
    for found, expected in zip(whole, tensors, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["gated", "grouped", "row", "vocabulary"])
def test_shards_of_two_sizes_hold_the_same_model(name: str) -> None:
    layout, tensors = CASES[name]
    two = [layout.merge(tensors, rank, 2) for rank in range(2)]
    again = layout.split(two)
    for rank in range(4):
        assert torch.equal(layout.merge(again, rank, 4), layout.merge(tensors, rank, 4))


def test_a_single_group_is_not_cut() -> None:
    tensors = [randn(6, 3), randn(2, 3), randn(2, 3) + 1]
    merged = QueryKeyValue(1, 3, 2).merge(tensors, 0, 1)
    assert torch.equal(merged, torch.cat(tensors))


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    """Megatron-Core reads ``[group, queries_per_group + 2, head_dim]`` out of the projection."""
    groups, queries, dim = 4, 3, 2
    q, k, v = (
        randn(groups * queries * dim, 5),
        randn(groups * dim, 5),
        randn(groups * dim, 6)[:, :5],
    )
    merged = QueryKeyValue(groups, queries, dim).merge([q, k, v], 1, 2)
    x = randn(5)
    mixed = (merged @ x).view(groups // 2, queries + 2, dim)
    for local, group in enumerate((2, 3)):
        expected = (q @ x).view(groups, queries, dim)[group]
        torch.testing.assert_close(mixed[local, :queries], expected)
        torch.testing.assert_close(mixed[local, queries], (k @ x).view(groups, dim)[group])
        torch.testing.assert_close(mixed[local, queries + 1], (v @ x).view(groups, dim)[group])


def test_gate_and_up_of_one_process_are_next_to_each_other() -> None:
    gate, up, x = randn(12, 5), randn(12, 6)[:, :5], randn(5)
    whole = torch.nn.functional.silu(gate @ x) * (up @ x)
    parts = []
    for rank in range(3):
        first, second = (Gated().merge([gate, up], rank, 3) @ x).chunk(2)
        parts.append(torch.nn.functional.silu(first) * second)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_each_part_of_a_packed_projection_is_cut_by_itself() -> None:
    whole = randn(10, 3)
    shard = Packed((4, 2, 4)).merge([whole], 1, 2)
    assert torch.equal(shard, whole[[2, 3, 5, 8, 9]])


def test_padded_rows_are_zero() -> None:
    shard = Vocabulary(21).merge([randn(21, HIDDEN)], 3, 4)
    assert shard.shape == (6, HIDDEN)
    assert torch.equal(shard[3:], torch.zeros(3, HIDDEN))


def test_merge_keeps_scales_with_their_weights() -> None:
    # One scale an output channel, and one a block of two input channels.
    weights = [randn(24, 8), randn(24, 9)[:, :8]]
    scales = [weight.abs().amax(1, keepdim=True) for weight in weights]
    merged = Gated().merge(weights, 1, 2)
    assert torch.equal(Gated().merge(scales, 1, 2), merged.abs().amax(1, keepdim=True))
    blocks = weights[0].view(24, 4, 2).abs().amax(-1)
    shard = Row().merge([weights[0]], 1, 2)
    assert torch.equal(Row().merge([blocks], 1, 2), shard.view(24, 2, 2).abs().amax(-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    path = write_tiny_model(tmp_path, family, tie_word_embeddings=tied, tokenizer=False)
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    architecture = architecture_from_config(config, source="memory")
    ours = Counter(
        pair
        for _, rule in model_parameters(architecture)
        for pair in zip(rule.hf_names, rule.hf_shapes, strict=True)
    )
    # A tied tensor is written once, and experts one by one.
    headers = open_checkpoint(f"hf:{path}").tensors.headers  # type: ignore[attr-defined]
    if tied:
        # Some versions of transformers write a hybrid's twice.
        headers.pop("lm_head.weight", None)
    assert ours == Counter((name, shape) for name, (_, shape) in headers.items())


def test_layers_are_numbered_in_the_whole_model(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, tokenizer=False)
    config = transformers.AutoConfig.from_pretrained(path).to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    rules = list(model_parameters(architecture_from_config(config, source="memory")))
    assert [layer for layer, _ in rules if layer is not None] == sorted(
        layer for layer, _ in rules if layer is not None
    )
    for layer, rule in rules:
        if layer is not None:
            assert all(f".layers.{layer}." in name for name in rule.hf_names)
            assert all("{layer}" in name for name in rule.names)
