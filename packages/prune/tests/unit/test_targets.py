from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import Hybrid, MixtureOfExperts
from slimtron_common.models.counting import count_parameters
from slimtron_prune import PruningConfig
from slimtron_prune.targets import target_architecture

DENSE = Architecture(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=2048,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
MIXTURE = replace(DENSE, family="mixtral", moe=MixtureOfExperts(num_experts=8, experts_per_token=2))
SHARED = replace(MIXTURE, family="qwen2_moe", moe=replace(MIXTURE.moe, shared_ffn_hidden_size=96))
HYBRID = replace(
    DENSE,
    family="nemotron_h",
    num_layers=6,
    hybrid=Hybrid(
        pattern="M-M*M-",
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_num_groups=2,
        mamba_state_dim=16,
    ),
)


def test_a_target_keeps_everything_else() -> None:
    config = PruningConfig(1024, 512, 6, 2, target_num_layers=26)
    assert target_architecture(DENSE, config) == replace(
        DENSE,
        ffn_hidden_size=1024,
        hidden_size=512,
        num_attention_heads=6,
        num_query_groups=2,
        num_layers=26,
    )
    dropped = target_architecture(DENSE, PruningConfig(drop_layers=[30, 1]))
    assert dropped == replace(DENSE, num_layers=28)


def test_a_mixture_is_pruned_by_its_experts() -> None:
    config = PruningConfig(target_num_moe_experts=4, target_moe_ffn_hidden_size=512)
    target = target_architecture(MIXTURE, config)
    assert target.moe == MixtureOfExperts(num_experts=4, experts_per_token=2)
    assert target.ffn_hidden_size == 512
    shared = PruningConfig(target_moe_shared_expert_intermediate_size=48)
    assert target_architecture(SHARED, shared).moe == replace(SHARED.moe, shared_ffn_hidden_size=48)


def test_a_hybrid_is_pruned_by_its_mamba_heads_and_layers() -> None:
    config = PruningConfig(target_mamba_num_heads=6, target_mamba_head_dim=8, target_num_layers=4)
    target = target_architecture(HYBRID, config)
    assert target.hybrid == replace(
        HYBRID.hybrid, pattern="M-M*", mamba_num_heads=6, mamba_head_dim=8
    )
    assert target.num_layers == 4
    dropped = target_architecture(HYBRID, PruningConfig(drop_layers=[1, 4]))
    assert dropped.hybrid == replace(HYBRID.hybrid, pattern="-MM-")


@pytest.mark.parametrize(
    ("config", "removed"),
    [
        (PruningConfig(target_ffn_hidden_size=1024), 30 * 3 * 576 * 512),
        (PruningConfig(target_num_layers=26), 4 * (2 * 576 + 576 * (2 * 576 + 2 * 192 + 3 * 1536))),
        (PruningConfig(None, None, 6, 2), 30 * 576 * (2 * 3 * 64 + 2 * 64)),
        # Everything is proportional to the hidden size.
        (PruningConfig(target_hidden_size=512), 134_515_008 // 9),
    ],
)
def test_parameters_are_counted_exactly(config: PruningConfig, removed: int) -> None:
    tied = replace(DENSE, tied_embeddings=True)
    assert sum(count_parameters(tied).values()) == 134_515_008
    target = target_architecture(tied, config)
    assert sum(count_parameters(target).values()) == 134_515_008 - removed


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (DENSE, {}, "nothing to prune to"),
        (DENSE, {"target_hidden_size": 576}, "own size"),
        (DENSE, {"target_hidden_size": 640}, "not larger"),
        (DENSE, {"target_ffn_hidden_size": 1001}, "tensor cores"),
        (DENSE, {"target_num_layers": 31}, "not larger"),
        (DENSE, {"drop_layers": [31]}, "no such layer"),
        (DENSE, {"drop_layers": list(range(1, 31))}, "no layer would be left"),
        (
            DENSE,
            {"target_num_attention_heads": 7, "target_num_query_groups": 3},
            "as many query heads",
        ),
        (
            DENSE,
            {"target_num_attention_heads": 8, "target_num_query_groups": 2},
            "more query heads than it was trained with",
        ),
        (DENSE, {"target_mamba_num_heads": 4}, "no Mamba layers"),
        (DENSE, {"target_num_moe_experts": 4}, "no experts"),
        (DENSE, {"target_moe_shared_expert_intermediate_size": 8}, "no shared experts"),
        (MIXTURE, {"target_ffn_hidden_size": 1024}, "no dense feed-forward"),
        (MIXTURE, {"target_num_moe_experts": 1}, "each token goes to 2"),
        (MIXTURE, {"target_num_moe_experts": 9}, "not larger"),
        (MIXTURE, {"target_moe_shared_expert_intermediate_size": 8}, "no shared experts"),
        (SHARED, {"target_moe_shared_expert_intermediate_size": 104}, "not larger"),
        (SHARED, {"target_moe_shared_expert_intermediate_size": 44}, "tensor cores"),
        (HYBRID, {"target_mamba_num_heads": 10}, "not larger"),
        (HYBRID, {"target_mamba_num_heads": 5}, "equally many"),
        (HYBRID, {"target_mamba_head_dim": 12}, "tensor cores"),
        (HYBRID, {"drop_layers": [1, 3, 5]}, "no Mamba layer"),
        (
            replace(HYBRID, hybrid=replace(HYBRID.hybrid, pattern="MMMM"), num_layers=4),
            {"target_ffn_hidden_size": 8},
            "no dense feed-forward",
        ),
        (
            replace(HYBRID, hybrid=replace(HYBRID.hybrid, pattern="MMMM"), num_layers=4),
            {"target_num_attention_heads": 3, "target_num_query_groups": 3},
            "no attention",
        ),
    ],
)
def test_refusals(model: Architecture, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_architecture(model, PruningConfig(**settings))
