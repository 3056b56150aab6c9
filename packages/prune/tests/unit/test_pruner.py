"""The contract in memory, one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.data import TokenDataset
from slimtron_common.errors import ConfigError, UnsupportedModelError
from slimtron_common.models.megatron import architecture_of, build_model
from slimtron_common.parallel import forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.versions import SHARED_EXPERTS
from slimtron_prune import PruningConfig, prune_language_model, save_pruned_model

CONFIG = PruningConfig(64, 48, 2, 2, target_num_layers=3)


def dataset() -> TokenDataset:
    return TokenDataset(np.random.default_rng(0).integers(0, 299, (4, 16)))


def logits(model: Any, context: Any) -> torch.Tensor:
    found: list[torch.Tensor] = []
    tokens = torch.arange(24).reshape(1, 24)
    forward_only(model, [tokens], context, lambda _, x: found.append(x.clone()))
    return found[0]


class Wrapper(torch.nn.Module):
    """What holds a model and its config, as a trainer's module does."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.config = module.config


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen3",
        "gemma",
        "nemotron",
        "mixtral",
        pytest.param("qwen2_moe", marks=SHARED_EXPERTS),
        "nemotron_h",
    ],
)
def test_whoever_holds_the_model_holds_the_smaller_one(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m", family)
    checkpoint = open_checkpoint(f"hf:{tmp_path / 'm'}")
    pruning = CONFIG
    if family == "mixtral":
        pruning = PruningConfig(
            None, 48, 2, 2, target_num_moe_experts=3, target_moe_ffn_hidden_size=64
        )
    if family == "qwen2_moe":
        pruning = PruningConfig(None, 48, 2, 2, target_moe_shared_expert_intermediate_size=32)
    if family == "nemotron_h":
        pruning = PruningConfig(
            64, 48, 2, 2, target_num_layers=5, target_mamba_num_heads=6, target_mamba_head_dim=8
        )
    data = dataset()
    tokens = data.tokens.copy()
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        model.train().requires_grad_(True)
        holder = Wrapper(model)
        pruned = prune_language_model(holder, pruning, data)
        assert pruned is holder
        assert holder.module is model
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert np.array_equal(data.tokens, tokens)
        # The config that others hold, too.
        assert holder.config.hidden_size == model.config.hidden_size == 48
        assert (holder.config.num_attention_heads, holder.config.kv_channels) == (2, 16)
        assert architecture_of(model).hidden_size == 48
        found = logits(model.eval(), context)
        save_pruned_model(holder, tmp_path / "out", model_dir=tmp_path / "m", export_format="hf")
        save_pruned_model(holder, tmp_path / "dist", model_dir=tmp_path / "m")
        again = open_checkpoint(f"megatron:{tmp_path / 'dist'}")
        reloaded = build_model(again.architecture, context, dtype=torch.float32)
        again.load(reloaded, context)
        torch.testing.assert_close(logits(reloaded, context), found)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert reference.config.model_type == family
    with torch.no_grad():
        expected = reference(torch.arange(24).reshape(1, 24)).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-3, atol=1e-3)
    # transformers 5.14 knows no cache for layers that need none.
    if family != "nemotron_h":
        assert reference.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[1] >= 3


def test_dropped_layers_count_from_one_and_need_no_text(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(f"hf:{tiny_model}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        before = [dict(layer.state_dict()) for layer in model.decoder.layers]
        prune_language_model(model, PruningConfig(drop_layers=[4, 2]))
        assert model.config.num_layers == len(model.decoder.layers) == 2
        assert [layer.layer_number for layer in model.decoder.layers] == [1, 2]
        for layer, number in zip(model.decoder.layers, (0, 2), strict=True):
            for name, tensor in layer.state_dict().items():
                if tensor is not None:
                    assert torch.equal(tensor, before[number][name]), name
        assert bool(logits(model, context).isfinite().all())


def test_a_refused_model_is_untouched(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(f"hf:{tiny_model}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        before = logits(model, context)
        for config, data, message in (
            (PruningConfig(), dataset(), "nothing to prune to"),
            (PruningConfig(target_hidden_size=128), dataset(), "not larger"),
            (PruningConfig(drop_layers=[5]), None, "no such layer"),
            (CONFIG, None, "found on a text"),
            (CONFIG, [], "no batches"),
            (CONFIG, [torch.zeros(2, 3)], "no batches"),
        ):
            with pytest.raises(ConfigError, match=message):
                prune_language_model(model, config, data)
        with pytest.raises(UnsupportedModelError, match="virtual pipeline"):
            prune_language_model([model, model], PruningConfig(drop_layers=[1]))
        with pytest.raises(ConfigError, match="is no format"):
            save_pruned_model(model, "nowhere", export_format="onnx")  # type: ignore[arg-type]
        torch.testing.assert_close(logits(model, context), before, rtol=0, atol=0)
        assert architecture_of(model).hidden_size == 64
