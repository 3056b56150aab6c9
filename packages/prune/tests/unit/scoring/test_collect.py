"""Scores against sums over the activations of transformers' models, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import ParallelismError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.versions import SHARED_EXPERTS
from slimtron_prune.scoring.collect import check_layout, collect_scores, normalized
from slimtron_prune.scoring.scores import Scores


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 299, (n, 16), generator=generator) for n in (2, 2, 1)]


def collected(path: Path) -> Scores:
    checkpoint = open_checkpoint(f"hf:{path}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        scores = collect_scores(model, batches(), checkpoint.architecture, context)
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks]
        assert not hooks or checkpoint.architecture.moe
    return scores


def reference(path: Path) -> dict[str, Tensor]:
    """The same sums, written out with hooks on transformers' modules."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).double().eval()
    layers = model.model.layers
    found: dict[str, list[Any]] = {name: [] for name in ("layers", "hidden", "residual", "heads")}
    seen: dict[Any, list[Tensor]] = {}

    def watch(key: Any, module: Any, *, output: bool = False) -> None:
        seen[key] = []

        def hook(_: Any, args: Any, out: Any) -> None:
            value = out if output else args[0]
            seen[key].append((value[0] if isinstance(value, tuple) else value).flatten(0, -2))

        module.register_forward_hook(hook)

    for n, layer in enumerate(layers):
        watch((n, "in"), layer)
        watch((n, "out"), layer, output=True)
        for which, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            watch((n, "before", which), norm)
            watch((n, "after", which), norm, output=True)
        watch((n, "o"), layer.self_attn.o_proj)
        watch((n, "down"), layer.mlp.down_proj)
    watch("final", model.model.norm)
    with torch.no_grad():
        for tokens in batches():
            model(tokens)
    x = {key: torch.cat(parts) for key, parts in seen.items()}
    ffn = []
    head_dim = model.config.head_dim
    for n, layer in enumerate(layers):
        cosine = torch.nn.functional.cosine_similarity(x[n, "in"], x[n, "out"], dim=-1)
        found["layers"].append((1 - cosine).mean())
        found["hidden"].append(torch.stack([x[n, "after", i].square().sum(0) for i in (0, 1)]))
        found["residual"].append(torch.stack([x[n, "before", i].square().sum(0) for i in (0, 1)]))
        weight = layer.self_attn.o_proj.weight
        added = [
            (x[n, "o"][:, at : at + head_dim] @ weight[:, at : at + head_dim].T).square().sum()
            for at in range(0, weight.shape[1], head_dim)
        ]
        found["heads"].append(torch.stack(added).detach())
        ffn.append(x[n, "down"].square().sum(0))
    sums = {name: torch.stack(values) for name, values in found.items()}
    return {**sums, "ffn": torch.stack(ffn), "final_residual": x["final"].square().sum(0)}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "nemotron"])
def test_scores_are_sums_over_activations(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m", family, tokenizer=False)
    scores, expected = collected(tmp_path / "m"), reference(tmp_path / "m")
    assert scores.num_tokens == 5 * 16
    for name, value in expected.items():
        found = scores.layers if name == "layers" else scores.sums[name]
        # float32 activations against float64's.
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


def test_mamba_layers_are_scored_by_what_their_heads_add(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m", "nemotron_h", tokenizer=False)
    scores = collected(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    pattern = "M-M*M-"
    seen: dict[str, list[Tensor]] = {name: [] for name in ("norm", "normed", "gated", "out", "up")}
    layer, feed_forward = model.model.layers[2], model.model.layers[5]

    def watch(name: str, module: Any, value: Any = lambda args, out: args[0]) -> None:
        module.register_forward_hook(
            lambda _, args, out: seen[name].append(value(args, out).flatten(0, -2))
        )

    watch("norm", layer.norm)
    watch("normed", layer.norm, lambda args, out: out)
    # The norm gates by itself, before it normalises.
    watch("gated", layer.mixer.norm, lambda args, out: args[0] * torch.nn.functional.silu(args[1]))
    watch("out", layer.mixer.out_proj)
    watch("up", feed_forward.mixer.down_proj)
    with torch.no_grad():
        for tokens in batches():
            model(tokens)
    x = {name: torch.cat(parts).double() for name, parts in seen.items()}
    weight = layer.mixer.out_proj.weight.double()
    heads = x["out"].reshape(len(x["out"]), 8, 16)
    added = torch.einsum("thp,ohp->tho", heads, weight.reshape(64, 8, 16))
    channels = (x["out"].square().sum(0) * weight.square().sum(0)).reshape(8, 16)
    for found, expected in (
        (scores.sums["residual"][2, 0], x["norm"].square().sum(0)),
        (scores.sums["hidden"][2, 0], x["normed"].square().sum(0)),
        (scores.sums["mamba_gated"][2], x["gated"].square().sum(0).reshape(8, 16)),
        (scores.mamba_heads[2], added.square().sum((0, 2))),
        (scores.mamba_channels[2], channels),
        (scores.ffn[5], x["up"].square().sum(0)),
    ):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)
    for values, kind in ((scores.heads, "*"), (scores.ffn, "-"), (scores.mamba_heads, "M")):
        assert [bool(row.any()) for row in values] == [letter == kind for letter in pattern]


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", pytest.param("qwen2_moe", marks=SHARED_EXPERTS)]
)
def test_experts_are_scored_by_what_they_add(family: str, tmp_path: Path) -> None:
    """The weighted outputs of transformers' experts, one expert at a time."""
    write_tiny_model(tmp_path / "m", family, tokenizer=False)
    scores = collected(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    inputs: list[Tensor] = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _, args, output: inputs.append(output.flatten(0, -2)))
    # Modules differ in transformers 4 and 5, files do not.
    files = load_file(tmp_path / "m" / "model.safetensors")
    layer = "block_sparse_moe" if family == "mixtral" else "mlp"
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def weight_of(module: str) -> Tensor:
        return files[f"model.layers.1.{layer}.{module}.weight"]

    with torch.no_grad():
        for tokens in batches():
            model(tokens)
        x = torch.cat(inputs)
        share = (x @ weight_of("gate").T).softmax(-1)
        top = share.topk(2, dim=-1)
        weight = torch.zeros_like(share).scatter(-1, top.indices, top.values)
        if family != "qwen2_moe":
            weight /= weight.sum(-1, keepdim=True)
        for number in range(share.shape[1]):
            gate, up, down = (weight_of(f"experts.{number}.{name}") for name in names)
            inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            chosen = weight[:, number] > 0
            energy = inner[chosen].square().sum(0)
            torch.testing.assert_close(scores.ffn[1, number], energy.double(), rtol=1e-3, atol=1e-4)
            added = weight[:, number, None] * (inner @ down.T)
            torch.testing.assert_close(
                scores.experts[1, number], added.square().sum().double(), rtol=1e-3, atol=1e-4
            )
        if family == "qwen2_moe":
            shared = model.model.layers[1].mlp.shared_expert
            inner = torch.nn.functional.silu(shared.gate_proj(x)) * shared.up_proj(x)
            inner *= model.model.layers[1].mlp.shared_expert_gate(x).sigmoid()
            torch.testing.assert_close(
                scores.shared[1], inner.square().sum(0).double(), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm1p", "layernorm1p"])
def test_a_norm_fused_into_a_linear_layer_is_computed(kind: str, tmp_path: Path) -> None:
    """As in Transformer Engine's modules, which hold the norm's parameters."""
    from slimtron_common.models.norms import NORMS

    family = {"rmsnorm": "llama", "rmsnorm1p": "gemma", "layernorm1p": "nemotron"}[kind]
    write_tiny_model(tmp_path / "m", family, tokenizer=False)
    architecture = open_checkpoint(f"hf:{tmp_path / 'm'}").architecture
    config = type("Config", (), {"params_dtype": torch.float32, "sequence_parallel": False})
    norm: Any = NORMS[architecture.normalization](config, 64, eps=architecture.norm_epsilon)
    torch.nn.init.normal_(norm.weight)
    fused: Any = torch.nn.Linear(64, 8)
    fused.layer_norm_weight = norm.weight
    if kind == "layernorm1p":
        fused.layer_norm_bias = torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 2, 64)
    torch.testing.assert_close(normalized(fused, x, architecture), norm(x))
    assert normalized(torch.nn.Linear(64, 8), x, architecture) is x


def test_layouts_without_scores_are_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m", "mixtral", tokenizer=False)
    mixture = open_checkpoint(f"hf:{tmp_path / 'm'}").architecture
    with pytest.raises(ParallelismError, match="expert's output") as caught:
        check_layout(mixture, tensor_parallel_size=2, context_parallel_size=1)
    assert "pipeline" in str(caught.value.hint)
    with pytest.raises(ParallelismError, match="not cut over processes"):
        check_layout(mixture, tensor_parallel_size=1, context_parallel_size=2)
