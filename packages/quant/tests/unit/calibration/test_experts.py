"""Tokens of experts, counted against transformers' own routers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import ConfigError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_quant.calibration.experts import ExpertTokens, RoutedTokens, warn_of_short_experts

TOKENS = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(1))


def test_routers_are_watched_and_experts_see_all_on_request(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2, tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{path}")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        routers = reference(TOKENS, output_router_logits=True).router_logits
    expected = [
        tuple(torch.bincount(logits.topk(2).indices.reshape(-1), minlength=4).tolist())
        for logits in routers
    ]
    with initialize_parallel(device="cpu") as context:
        model: Any = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        experts = model.decoder.layers[1].mlp.experts.local_experts
        seen = [0] * len(experts)

        def count(expert: int, hidden: torch.Tensor) -> None:
            seen[expert] += len(hidden)

        for index, expert in enumerate(experts):
            expert.register_forward_pre_hook(lambda _, args, index=index: count(index, args[0]))

        def logits(**kwargs: bool) -> tuple[RoutedTokens, list[torch.Tensor]]:
            outputs: list[torch.Tensor] = []
            routed = RoutedTokens(model, **kwargs)

            def loop(model: Any) -> None:
                forward_only(
                    model, TOKENS.split(2), context, lambda _, x: outputs.append(x.clone())
                )

            # A second run starts anew.
            routed.during(loop)(model)
            outputs.clear()
            seen[:] = [0] * len(experts)
            routed.during(loop)(model)
            return routed, outputs

        as_routed: list[torch.Tensor] = []
        for to_all in (False, True):
            routed, outputs = logits(to_all=to_all)
            for _ in range(2):
                found = routed.result(context)
                assert [layer.tokens for layer in found] == expected
            assert seen == ([TOKENS.numel()] * 4 if to_all else list(expected[1]))
            if to_all:
                # Megatron-Core 0.15 adds up experts in the order in which tokens lie.
                for found_logits, expected_logits in zip(outputs, as_routed, strict=True):
                    torch.testing.assert_close(found_logits, expected_logits, rtol=1e-5, atol=1e-5)
            else:
                as_routed = outputs
        assert not model.decoder.layers[0].mlp.router._forward_hooks

        model.config.moe_expert_capacity_factor = 1.0
        with pytest.raises(ConfigError, match="every token") as caught:
            RoutedTokens(model, to_all=True)
        assert caught.value.where == "calibrate_all_experts"


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", num_hidden_layers=1, tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{path}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        routed = RoutedTokens(model, to_all=True)
        routed.during(lambda _: None)(model)
        assert routed.result(context) == []


def test_experts_below_a_threshold(caplog: pytest.LogCaptureFixture) -> None:
    layers = [ExpertTokens(layer=0, tokens=(5, 0, 9)), ExpertTokens(layer=1, tokens=(7, 7, 7))]
    assert [layer.below(6) for layer in layers] == [(0, 1), ()]
    assert [ExpertTokens.from_dict(layer.to_dict()) for layer in layers] == layers
    with caplog.at_level(logging.WARNING):
        warn_of_short_experts(layers, 1)
        warn_of_short_experts(layers[1:], 6)
    assert [record.getMessage()[:36] for record in caplog.records] == [
        "1 of 6 experts saw fewer than 1 cali"
    ]
