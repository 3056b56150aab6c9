"""Cutting against slices that are written out, and against transformers' own models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.models import Architecture
from slimtron_common.models.huggingface import config_from_architecture
from slimtron_common.testing import write_tiny_model
from slimtron_prune.cutting import Cutter
from slimtron_prune.scoring.scores import Scores
from slimtron_prune.selection import select

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "nemotron",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "nemotron_h",
]


RandomScores = Callable[[Architecture], Scores]


def test_every_tensor_is_the_slice_that_is_meant(
    tmp_path: Path, random_scores: RandomScores
) -> None:
    write_tiny_model(tmp_path / "m", tokenizer=False, tie_word_embeddings=False)
    source = open_checkpoint(f"hf:{tmp_path / 'm'}").architecture
    before = load_file(tmp_path / "m" / "model.safetensors")
    target = replace(
        source,
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=40,
        num_attention_heads=2,
        num_query_groups=1,
    )
    selection = select(target, random_scores(source))
    after = dict(Cutter(selection).tensors(before.__getitem__))
    assert selection.hidden is not None
    h = selection.hidden
    assert torch.equal(
        after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, h]
    )
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"][:, h])
    final = before["model.norm.weight"][h] * selection.final_norm_factor
    torch.testing.assert_close(after["model.norm.weight"], final)
    for new, old in enumerate(selection.layers):
        a, b = f"model.layers.{new}", f"model.layers.{old}"
        f = selection.indices("ffn", old, None)
        q = selection.indices("queries", old, None)
        kv = selection.indices("key_values", old, None)
        assert f is not None
        assert q is not None
        assert kv is not None
        expected = {
            "self_attn.q_proj": before[f"{b}.self_attn.q_proj.weight"][q][:, h],
            "self_attn.k_proj": before[f"{b}.self_attn.k_proj.weight"][kv][:, h],
            "self_attn.v_proj": before[f"{b}.self_attn.v_proj.weight"][kv][:, h],
            "self_attn.o_proj": before[f"{b}.self_attn.o_proj.weight"][h][:, q],
            "mlp.gate_proj": before[f"{b}.mlp.gate_proj.weight"][f][:, h],
            "mlp.up_proj": before[f"{b}.mlp.up_proj.weight"][f][:, h],
            "mlp.down_proj": before[f"{b}.mlp.down_proj.weight"][h][:, f],
        }
        for name, tensor in expected.items():
            assert torch.equal(after[f"{a}.{name}.weight"], tensor), name
        for number, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
            scaled = before[f"{b}.{norm}.weight"][h] * selection.norm_factor(old, number)
            torch.testing.assert_close(after[f"{a}.{norm}.weight"], scaled)
    assert len(after) == 3 + 2 * 9


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_a_place_for_every_tensor(
    family: str, tmp_path: Path, random_scores: RandomScores
) -> None:
    write_tiny_model(tmp_path / "m", family, tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{tmp_path / 'm'}")
    source = checkpoint.architecture
    moe = source.moe and replace(source.moe, num_experts=3)
    if moe and moe.shared_ffn_hidden_size:
        moe = replace(moe, shared_ffn_hidden_size=40)
    target = replace(
        source,
        num_layers=3,
        hidden_size=40,
        ffn_hidden_size=24,
        num_attention_heads=2,
        num_query_groups=2,
        moe=moe,
        hybrid=source.hybrid and replace(source.hybrid, mamba_num_heads=6, mamba_head_dim=8),
    )
    selection = select(target, random_scores(source))
    cutter = Cutter(selection)
    tensors = dict(cutter.tensors(checkpoint.tensors.read))  # type: ignore[attr-defined]
    write_json(tmp_path / "config.json", config_from_architecture(selection.target))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if source.moe is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if source.hybrid:
            # Their names in files, which transformers changes as it reads them.
            wanted = {name.replace("model.", "backbone."): s for name, s in wanted.items()}
        assert shapes == wanted
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())


def test_every_tensor_of_a_mamba_layer_is_its_own_indices_of_the_original(
    tmp_path: Path, random_scores: RandomScores
) -> None:
    write_tiny_model(tmp_path / "m", "nemotron_h", tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{tmp_path / 'm'}")
    source, read = checkpoint.architecture, checkpoint.tensors.read  # type: ignore[attr-defined]
    assert source.hybrid is not None
    smaller = replace(source.hybrid, mamba_num_heads=4, mamba_head_dim=8)
    selection = select(replace(source, hidden_size=40, hybrid=smaller), random_scores(source))
    after = dict(Cutter(selection).tensors(read))
    hidden, layer = selection.hidden, "backbone.layers.2"
    inner, heads = (selection.indices(axis, 2, None) for axis in ("mamba_inner", "mamba_heads"))
    assert inner is not None
    assert heads is not None
    z, x, states, dt = read(f"{layer}.mixer.in_proj.weight").split([128, 128, 64, 8])
    expected = {
        "in_proj.weight": torch.cat([z[inner], x[inner], states, dt[heads]])[:, hidden],
        **{
            f"conv1d.{kind}": torch.cat([whole[:128][inner], whole[128:]])
            for kind in ("weight", "bias")
            for whole in [read(f"{layer}.mixer.conv1d.{kind}")]
        },
        **{name: read(f"{layer}.mixer.{name}")[heads] for name in ("A_log", "D", "dt_bias")},
        "norm.weight": read(f"{layer}.mixer.norm.weight")[inner]
        * selection.mamba_norm_factor(2).float(),  # type: ignore[union-attr]
        "out_proj.weight": read(f"{layer}.mixer.out_proj.weight")[hidden][:, inner],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(after[f"{layer}.mixer.{name}"], tensor, msg=name)


def test_a_norm_that_is_stored_less_one_is_scaled_as_a_whole(
    tmp_path: Path, random_scores: RandomScores
) -> None:
    write_tiny_model(tmp_path / "m", "gemma", tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{tmp_path / 'm'}")
    target = replace(checkpoint.architecture, hidden_size=32)
    selection = select(target, random_scores(checkpoint.architecture))
    read = checkpoint.tensors.read  # type: ignore[attr-defined]
    after = dict(Cutter(selection).tensors(read))["model.norm.weight"]
    expected = (read("model.norm.weight")[selection.hidden] + 1) * selection.final_norm_factor
    torch.testing.assert_close(after + 1, expected)
