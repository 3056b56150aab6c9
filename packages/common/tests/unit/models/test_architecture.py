from __future__ import annotations

import dataclasses

import pytest

from slimtron_common.errors import ParallelismError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import MixtureOfExperts

SMOLLM2 = Architecture(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    rotary_base=1e5,
)


def test_widths_of_the_heads() -> None:
    assert SMOLLM2.query_size == 9 * 64
    assert SMOLLM2.key_value_size == 3 * 64


@pytest.mark.parametrize(("tp", "padded"), [(1, 49152), (3, 49152), (5, 49155), (7, 49154)])
def test_vocabulary_is_padded_to_the_next_multiple(tp: int, padded: int) -> None:
    assert SMOLLM2.padded_vocab_size(tp) == padded
    assert padded % tp == 0
    assert 0 <= padded - SMOLLM2.vocab_size < tp


def test_parameters_of_experts() -> None:
    mixture = MixtureOfExperts(num_experts=8, experts_per_token=2)
    assert SMOLLM2.num_expert_parameters == 0
    gated = dataclasses.replace(SMOLLM2, moe=mixture)
    assert gated.num_expert_parameters == 30 * 8 * 3 * 576 * 1536
    plain = dataclasses.replace(gated, activation="squared_relu")
    assert plain.num_expert_parameters == 30 * 8 * 2 * 576 * 1536


def test_admitted_tensor_sizes_are_those_that_divide() -> None:
    assert SMOLLM2.tensor_parallel_sizes == [1, 3]


def test_stages_need_not_have_equally_many_layers() -> None:
    assert SMOLLM2.pipeline_parallel_sizes == list(range(1, 31))
    assert SMOLLM2.stage_layers(5) == [6, 6, 6, 6, 6]
    assert SMOLLM2.stage_layers(4) == [8, 8, 7, 7]
    assert SMOLLM2.stage_layers(30) == [1] * 30


@pytest.mark.parametrize("tp", range(1, 12))
@pytest.mark.parametrize("pp", [1, 2, 4, 30, 31, 60])
def test_check_agrees_with_the_admitted_sizes(tp: int, pp: int) -> None:
    layout = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    if tp in SMOLLM2.tensor_parallel_sizes and pp in SMOLLM2.pipeline_parallel_sizes:
        SMOLLM2.check_parallel(**layout)
    else:
        with pytest.raises(ParallelismError):
            SMOLLM2.check_parallel(**layout)


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 2, "9 attention heads"),
        ({"num_attention_heads": 12}, 2, "3 key/value heads"),
        ({"num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 1533}, 4, "1533"),
    ],
)
def test_refusal_names_what_does_not_divide(changes: dict[str, int], tp: int, message: str) -> None:
    architecture = dataclasses.replace(SMOLLM2, **changes)
    with pytest.raises(ParallelismError, match=message) as caught:
        architecture.check_parallel(tensor_parallel_size=tp, pipeline_parallel_size=1)
    assert caught.value.where == "parallel.tensor_parallel_size"
    assert caught.value.allowed == ", ".join(map(str, architecture.tensor_parallel_sizes))
    assert caught.value.exit_code == 2


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ParallelismError, match="30 layers") as caught:
        SMOLLM2.check_parallel(tensor_parallel_size=1, pipeline_parallel_size=60)
    assert caught.value.where == "parallel.pipeline_parallel_size"


def test_experts_are_shared_out_evenly() -> None:
    moe = MixtureOfExperts(num_experts=6, experts_per_token=2)
    mixture = dataclasses.replace(SMOLLM2, family="mixtral", moe=moe)
    assert mixture.expert_parallel_sizes == [1, 2, 3, 6]
    layout = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    mixture.check_parallel(**layout, expert_parallel_size=3)
    with pytest.raises(ParallelismError, match="6 experts") as caught:
        mixture.check_parallel(**layout, expert_parallel_size=4)
    assert caught.value.where == "parallel.expert_parallel_size"
    assert caught.value.allowed == "1, 2, 3, 6"
    assert SMOLLM2.expert_parallel_sizes == [1]
    with pytest.raises(ParallelismError, match="dense"):
        SMOLLM2.check_parallel(**layout, expert_parallel_size=2)
