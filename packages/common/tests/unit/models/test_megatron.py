from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch

from slimtron_common.errors import MissingDependencyError, ParallelismError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import MixtureOfExperts
from slimtron_common.models.megatron import (
    architecture_of,
    build_model,
    transformer_engine_available,
)
from slimtron_common.parallel import ParallelContext, initialize_parallel

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
    dtype="float32",
)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def test_a_layout_that_does_not_divide_is_refused(context: ParallelContext) -> None:
    three = dataclasses.replace(context, tp_size=3)
    with pytest.raises(ParallelismError, match="4 attention heads"):
        build_model(LLAMA, three, dtype=torch.float32)
    five = dataclasses.replace(context, ep_size=5)
    moe = MixtureOfExperts(num_experts=4, experts_per_token=2)
    mixtral = dataclasses.replace(LLAMA, family="mixtral", moe=moe)
    with pytest.raises(ParallelismError, match="4 experts"):
        build_model(mixtral, five, dtype=torch.float32)
    with pytest.raises(ParallelismError, match="dense"):
        build_model(LLAMA, five, dtype=torch.float32)


@pytest.mark.skipif(transformer_engine_available(), reason="Transformer Engine is installed")
def test_absent_transformer_engine_is_named(context: ParallelContext) -> None:
    with pytest.raises(MissingDependencyError, match="Transformer Engine"):
        build_model(LLAMA, context, dtype=torch.float32, layer_spec="transformer_engine")


def test_one_layer_is_a_pipeline_stage_of_its_own(context: ParallelContext) -> None:
    last = LLAMA.num_layers - 1
    for layer in (0, last):
        model = build_model(LLAMA, context, dtype=torch.float32, layer=layer)
        assert [block.layer_number for block in model.decoder.layers] == [layer + 1]
        assert hasattr(model, "embedding") == (layer == 0)
        assert (model.decoder.final_layernorm is not None) == (layer == last)
        assert architecture_of(model).num_layers == LLAMA.num_layers


def test_building_says_nothing(context: ParallelContext, caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("megatron.core.models.gpt.gpt_model").level
    build_model(LLAMA, context, dtype=torch.float32)
    assert caplog.records == []
    assert logging.getLogger("megatron.core.models.gpt.gpt_model").level == level


def test_weights_that_tensor_parallelism_cuts_are_marked(context: ParallelContext) -> None:
    """The norm of a gradient counts an unmarked weight once, whatever it is cut into."""
    model = build_model(LLAMA, context, dtype=torch.float32)
    marked = {
        name.removeprefix("decoder.layers.0."): parameter.partition_dim
        for name, parameter in model.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False) and "layers.1" not in name
    }
    assert marked == {
        "embedding.word_embeddings.weight": 0,
        "self_attention.linear_qkv.weight": 0,
        "self_attention.linear_proj.weight": 1,
        "mlp.linear_fc1.weight": 0,
        "mlp.linear_fc2.weight": 1,
        "output_layer.weight": 0,
    }


def test_settings_reach_megatrons_config(context: ParallelContext) -> None:
    model = build_model(
        LLAMA, context, dtype=torch.float32, settings={"recompute_granularity": "selective"}
    )
    assert model.config.recompute_granularity == "selective"  # type: ignore[union-attr]
