from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import Hybrid, MixtureOfExperts
from slimtron_prune.scoring.scores import Scores
from slimtron_prune.selection import select, select_layers

SOURCE = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=4,
    vocab_size=32,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)


RandomScores = Callable[[Architecture], Scores]


def best(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda n: -values[n])[:count])


def test_what_scores_highest_is_kept_in_its_order(random_scores: RandomScores) -> None:
    scores = random_scores(SOURCE)
    target = replace(SOURCE, num_layers=2, hidden_size=8, ffn_hidden_size=16)
    selection = select(target, scores)
    assert list(selection.layers) == best(scores.layers.tolist(), 2)
    assert selection.hidden is not None
    assert selection.hidden.tolist() == best(scores.hidden.tolist(), 8)
    assert selection.ffn is not None
    assert selection.ffn.tolist() == [best(row.tolist(), 16) for row in scores.ffn]
    assert selection.heads is None


def test_ties_keep_the_first(random_scores: RandomScores) -> None:
    scores = random_scores(SOURCE)
    scores.sums["ffn"].fill_(1.0)
    selection = select(replace(SOURCE, ffn_hidden_size=8), scores)
    assert selection.ffn is not None
    assert selection.ffn.tolist() == [list(range(8))] * 3


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2), (2, 2), (1, 1)])
def test_query_heads_stay_with_their_groups(
    heads: int, groups: int, random_scores: RandomScores
) -> None:
    scores = random_scores(SOURCE)
    target = replace(SOURCE, num_attention_heads=heads, num_query_groups=groups)
    selection = select(target, scores)
    assert selection.heads is not None
    assert selection.groups is not None
    each = heads // groups
    for layer, values in enumerate(scores.heads.tolist()):
        of_group = {g: values[2 * g : 2 * g + 2] for g in range(3)}
        totals = [sum(sorted(of_group[g])[-each:]) for g in range(3)]
        kept = best(totals, groups)
        assert selection.groups[layer].tolist() == kept
        expected = [2 * g + n for g in kept for n in best(of_group[g], each)]
        assert selection.heads[layer].tolist() == expected


def test_indices_of_heads_are_their_channels(random_scores: RandomScores) -> None:
    target = replace(SOURCE, num_attention_heads=2, num_query_groups=2)
    selection = select(target, random_scores(SOURCE))
    assert selection.heads is not None
    channels = selection.indices("queries", 1, None)
    assert channels is not None
    expected = [4 * head + n for head in selection.heads[1].tolist() for n in range(4)]
    assert channels.tolist() == expected
    assert selection.indices("hidden", None, None) is None


def test_experts_are_chosen_layer_by_layer(random_scores: RandomScores) -> None:
    moe = MixtureOfExperts(num_experts=4, experts_per_token=2)
    source = replace(SOURCE, family="mixtral", moe=moe)
    scores = random_scores(source)
    target = replace(source, ffn_hidden_size=8, moe=replace(moe, num_experts=2))
    selection = select(target, scores)
    assert selection.experts is not None
    assert selection.experts.tolist() == [best(row.tolist(), 2) for row in scores.experts]
    kept = selection.expert(1, 1)
    assert kept == selection.experts[1, 1]
    channels = selection.indices("ffn", 1, kept)
    assert channels is not None
    assert channels.tolist() == best(scores.ffn[1, kept].tolist(), 8)


def test_norms_make_up_for_the_channels_that_go(random_scores: RandomScores) -> None:
    scores = random_scores(SOURCE)
    selection = select(replace(SOURCE, hidden_size=8), scores)
    assert selection.hidden is not None
    residual = scores.sums["residual"][2, 1]
    expected = (residual[selection.hidden].mean() / residual.mean()).sqrt()
    assert selection.norm_factor(2, 1) == pytest.approx(float(expected))
    assert selection.norm_factor(None, 0) == selection.final_norm_factor != 1
    layer_norms = replace(SOURCE, family="nemotron", normalization="layernorm1p")
    selection = select(replace(layer_norms, hidden_size=8), random_scores(layer_norms))
    assert selection.norm_factor(2, 1) == selection.norm_factor(None, 0) == 1


def test_a_list_of_layers_needs_no_scores() -> None:
    selection = select_layers(SOURCE, replace(SOURCE, num_layers=2), {2})
    assert selection.layers == (0, 2)


HYBRID = replace(
    SOURCE,
    family="nemotron_h",
    num_layers=4,
    hybrid=Hybrid(
        pattern="M-*M",
        mamba_num_heads=6,
        mamba_head_dim=4,
        mamba_num_groups=2,
        mamba_state_dim=3,
    ),
)


def test_mamba_heads_stay_with_their_groups(random_scores: RandomScores) -> None:
    scores = random_scores(HYBRID)
    smaller = replace(HYBRID.hybrid, mamba_num_heads=4, mamba_head_dim=2)  # type: ignore[type-var]
    selection = select(replace(HYBRID, hybrid=smaller), scores)
    heads = scores.mamba_heads[3].tolist()
    kept = [*best(heads[:3], 2), *(3 + n for n in best(heads[3:], 2))]
    channels = [best(scores.mamba_channels[3, head].tolist(), 2) for head in kept]
    inner = [4 * head + c for head, chosen in zip(kept, channels, strict=True) for c in chosen]
    states = list(range(2 * 2 * 3))
    expected = {
        "mamba_heads": kept,
        "mamba_inner": inner,
        "mamba_conv": [*inner, *(24 + n for n in states)],
        "mamba_projection": [
            *inner,
            *(24 + n for n in inner),
            *(48 + n for n in states),
            *(60 + head for head in kept),
        ],
    }
    for axis, indices in expected.items():
        found = selection.indices(axis, 3, None)  # type: ignore[arg-type]
        assert found is not None
        assert found.tolist() == indices, axis
    # Each half of the inner channels is a group, and has a norm of its own.
    gated = scores.sums["mamba_gated"][3].reshape(-1)
    factors = selection.mamba_norm_factor(3)
    assert factors is not None
    for group in (0, 1):
        own = [n for n in inner if n // 12 == group]
        whole = gated[12 * group : 12 * (group + 1)]
        wanted = (gated[own].mean() / whole.mean()).sqrt()
        assert factors[4 * group : 4 * (group + 1)].tolist() == pytest.approx([float(wanted)] * 4)


def test_the_pattern_follows_the_layers(random_scores: RandomScores) -> None:
    scores = random_scores(HYBRID)
    scores.sums["layers"].copy_(scores.sums["layers"].new_tensor([1.0, 4.0, 3.0, 2.0]))
    selection = select(replace(HYBRID, num_layers=3), scores)
    assert selection.layers == (1, 2, 3)
    assert selection.target.hybrid is not None
    assert selection.target.hybrid.pattern == "-*M"
    with pytest.raises(ConfigError, match="no Mamba layer"):
        select(replace(HYBRID, num_layers=2), scores)
