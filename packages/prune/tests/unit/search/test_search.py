from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.mapping import model_parameters
from slimtron_common.parallel import ParallelConfig
from slimtron_prune.scoring.scores import Scores
from slimtron_prune.search.config import SearchConfig, parse_size
from slimtron_prune.search.rank import lost_importance, search
from slimtron_prune.search.shapes import count, kv_cache_bytes, search_space

SOURCE = Architecture(
    family="llama",
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    vocab_size=100,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("100M", 10**8), ("1.5B", 15 * 10**8), ("1GiB", 2**30), ("2 GB", 2 * 10**9), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, where="x") == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1e5", "ten", "0", "3Q"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text, where="x")


def space(layout: ParallelConfig | None = None, **settings: Any) -> Any:
    config = SearchConfig(**{"target_ratio": 0.7, **settings})
    return search_space(SOURCE, config, layout or ParallelConfig(), 2)


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_those_of_the_parameters(tied: bool) -> None:
    shape = replace(SOURCE, num_layers=5, ffn_hidden_size=96, tied_embeddings=tied)
    expected = sum(prod(s) for _, rule in model_parameters(shape) for s in rule.hf_shapes)
    assert count(shape) == expected
    # Keys and values of 5 layers with 4 heads of 8 channels, two bytes each.
    assert kv_cache_bytes(shape, 100, 2) == 2 * 5 * 4 * 8 * 100 * 2
    memory = space(target_ratio=None, target_memory="300KB", memory_seq_length=100)
    assert memory.cost(shape) == count(shape) * 2 + kv_cache_bytes(shape, 100, 2)


def test_shapes_are_what_hardware_and_layout_take() -> None:
    found = list(space(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=5)))
    assert {s.num_layers for s in found} == {5, 6, 7, 8}
    assert {s.hidden_size for s in found} == {32, 40, 48, 56, 64}
    assert {s.ffn_hidden_size for s in found} == {64, 80, 96, 112, 128}
    heads = {(s.num_attention_heads, s.num_query_groups) for s in found}
    assert heads == {(4, 2), (4, 4), (8, 4)}
    assert SOURCE not in found
    bounds = {"num_layers": (6, 6), "hidden_size": (60, 64), "num_query_groups": (4, 4)}
    found = list(space(bounds=bounds))
    assert {(s.num_layers, s.hidden_size, s.num_query_groups) for s in found} == {(6, 64, 4)}


RandomScores = Callable[[Architecture], Scores]


def test_lost_importance_is_the_share_that_goes(random_scores: RandomScores) -> None:
    found = random_scores(SOURCE)
    shape = replace(SOURCE, num_layers=6, ffn_hidden_size=96)
    worst = found.layers.sort().values[:2].sum() / found.layers.sum()
    assert lost_importance("layers", shape, found) == pytest.approx(float(worst))
    ffn = found.ffn.sort(dim=-1).values
    assert lost_importance("ffn", shape, found) == pytest.approx(
        float(ffn[:, :32].sum() / ffn.sum())
    )
    assert lost_importance("hidden", shape, found) == 0
    assert lost_importance("layers", SOURCE, found) == pytest.approx(0)


def test_the_search_finds_what_costs_least_quality(random_scores: RandomScores) -> None:
    """A world in which only layers matter: everything else is cut first."""
    measured: list[Architecture] = []

    def measure(shape: Architecture) -> float:
        measured.append(shape)
        return 2.0 + (8 - shape.num_layers) + 0.01 * (64 - shape.hidden_size) / 8

    result = search(space(), random_scores(SOURCE), measure, num_candidates=4)
    assert result.original.loss == 2.0
    assert result.best.shape.num_layers == 8
    assert result.best.cost <= 0.7 * count(SOURCE)
    assert [c.loss for c in result.candidates] == sorted(c.loss or 0 for c in result.candidates)
    # The model, a probe of each part, and the candidates.
    assert len(measured) == 1 + 4 + 4
    costs = [candidate.cost for candidate in result.curve]
    assert costs == sorted(costs)
    predictions = [candidate.predicted for candidate in result.curve]
    assert predictions == sorted(predictions, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_params": 10}, "one budget"),
        ({"target_ratio": 0.0}, "no share"),
        ({"num_candidates": 0}, "too small"),
        ({"bounds": {"width": (1, 2)}}, "no dimension"),
        ({"bounds": {"num_layers": (4, 2)}}, "no bounds"),
        ({"bounds": {"num_layers": (9, 9)}}, "not larger"),
        ({"target_ratio": 0.01}, "no shape within the bounds fits"),
        ({"target_ratio": None, "target_params": "1B"}, "the model itself fits"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(**settings)
