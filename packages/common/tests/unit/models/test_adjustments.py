from __future__ import annotations

from typing import Any

import torch

from slimtron_common.models import Architecture
from slimtron_common.models.adjustments import (
    scale_embeddings,
    scales_embeddings,
    weight_expert_outputs,
)
from slimtron_common.models.architecture import MixtureOfExperts
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel

MIXTRAL = Architecture(
    family="mixtral",
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=8,
    vocab_size=30,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    moe=MixtureOfExperts(num_experts=2, experts_per_token=2),
)


def test_embeddings_are_scaled_in_their_own_type() -> None:
    embedding = torch.nn.Embedding(4, 48, dtype=torch.bfloat16)
    plain = embedding(torch.arange(4))
    assert not scales_embeddings(embedding)
    scale_embeddings(embedding)
    assert scales_embeddings(embedding)
    # The root of 48 is rounded first, as transformers rounds it.
    assert torch.equal(embedding(torch.arange(4)), plain * torch.tensor(48**0.5).bfloat16())


def test_second_layers_of_experts_see_inputs_without_weights() -> None:
    with initialize_parallel(device="cpu") as context:
        model: Any = build_model(MIXTRAL, context, dtype=torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        # Once is enough.
        weight_expert_outputs(model)
        layer = model.decoder.layers[0].mlp
        hidden, seen = torch.randn(5, 1, 16), []
        for expert in layer.experts.local_experts:
            expert.linear_fc2.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        with torch.no_grad():
            found = layer(hidden)[0]

        rows = hidden.reshape(5, 16).double()
        weights = (rows @ layer.router.weight.double().T).softmax(-1)
        expected = torch.zeros(5, 16, dtype=torch.float64)
        for number, expert in enumerate(layer.experts.local_experts):
            gate, up = (rows @ expert.linear_fc1.weight.double().T).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(seen[number].double(), inner, rtol=1e-4, atol=1e-5)
            output = inner @ expert.linear_fc2.weight.double().T
            expected += weights[:, number : number + 1] * output
        torch.testing.assert_close(found.reshape(5, 16).double(), expected, rtol=1e-4, atol=1e-5)
