from __future__ import annotations

import dataclasses

import pytest
import torch

from slimtron_common.models import Architecture
from slimtron_common.models.architecture import MixtureOfExperts
from slimtron_common.models.linear import linear_layers
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel

LLAMA = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=301,
    max_position_embeddings=256,
    norm_epsilon=3e-6,
    rotary_base=5e5,
)
MOE = MixtureOfExperts(num_experts=4, experts_per_token=2)
NEMOTRON = dataclasses.replace(
    LLAMA, family="nemotron", activation="squared_relu", normalization="layernorm1p"
)
MIXTRAL = dataclasses.replace(LLAMA, family="mixtral", moe=MOE)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True)


@pytest.mark.parametrize("architecture", [LLAMA, QWEN2, NEMOTRON, MIXTRAL], ids=lambda a: a.family)
def test_they_are_those_of_the_built_model(architecture: Architecture) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    with initialize_parallel(device="cpu") as context:
        model = build_model(architecture, context, dtype=torch.float32)
        built = {
            name: (
                tuple(module.weight.shape),
                "row" if isinstance(module, RowParallelLinear) else "column",
            )
            for name, module in model.decoder.named_modules(prefix="decoder")
            if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        }
    found = linear_layers(architecture)
    assert {
        layer.name: ((layer.out_features, layer.in_features), layer.parallel) for layer in found
    } == built
    assert [layer.layer for layer in found] == sorted(layer.layer for layer in found)


def test_names_and_channels_in_one_process() -> None:
    layers = {layer.name: layer for layer in linear_layers(MIXTRAL)}
    down = layers["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2"]
    assert (down.kind, down.layer, down.expert) == ("mlp.experts.linear_fc2", 1, 3)
    assert (
        down.local_name(first_layer=1, first_expert=2)
        == "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2"
    )
    assert (down.in_features, down.local_in_features(2)) == (96, 48)
    qkv = layers["decoder.layers.1.self_attention.linear_qkv"]
    assert (qkv.in_features, qkv.local_in_features(2), qkv.out_features) == (64, 64, 256)
    assert (qkv.kind, qkv.expert) == ("self_attention.linear_qkv", None)
    assert qkv.local_name(first_layer=1, first_expert=2).startswith("decoder.layers.0.self_")
