"""Measured sensitivities against transformers' model in float64, rounded by our own formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.linear import linear_layers
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_quant import QuantizationConfig, Quantizer, calibration_loop
from slimtron_quant.formats import FORMATS, Calibration
from slimtron_quant.mixed.divergence import Divergence, measure_groups
from slimtron_quant.mixed.groups import format_groups

BLOCK = 16
TOKENS = torch.randint(0, 300, (5, 32), generator=torch.Generator().manual_seed(3))
PARTS = {
    "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.linear_proj": ["self_attn.o_proj"],
    "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.linear_fc2": ["mlp.down_proj"],
}


@contextmanager
def loaded(model_dir: Path) -> Iterator[tuple[Any, ParallelContext]]:
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        yield model, context


def measured(model_dir: Path, recipe: str) -> dict[str, float]:
    groups = format_groups(linear_layers(open_checkpoint(f"hf:{model_dir}").architecture))
    # The last batch is shorter.
    batches = list(TOKENS.split(2))
    with loaded(model_dir) as (model, context):
        divergence = Divergence(model, batches, context, vocab_size=300)
        Quantizer(QuantizationConfig(recipe, BLOCK)).quantize(
            model, calibration_loop(batches, context)
        )
        found = measure_groups(model, groups, divergence, description="test")
        # Everything is on again.
        assert divergence.measure(model) > max(found.values())
    return found


def reference(model_dir: Path, recipe: str) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    found = {}
    with torch.no_grad():
        original = model(TOKENS).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        for layer in range(model.config.num_hidden_layers):
            for kind, parts in PARTS.items():
                names = [f"model.layers.{layer}.{part}" for part in parts]
                with rounded(model, names, recipe, inputs[names[0]].abs().max()):
                    changed = model(TOKENS).logits.log_softmax(-1)
                kl = (original.exp() * (original - changed)).sum(-1).mean()
                found[f"decoder.layers.{layer}.{kind}"] = float(kl)
    return found


@contextmanager
def rounded(model: Any, names: list[str], recipe: str, input_amax: Tensor) -> Iterator[None]:
    """These layers alone in a format; one scale for all of them where it is by tensor."""
    fmt, modules = FORMATS[recipe], [model.get_submodule(name) for name in names]
    largest = torch.stack([module.weight.abs().max() for module in modules]).max()
    kept = [module.weight.data.clone() for module in modules]
    hooks = []
    for module in modules:
        weight = module.weight.data.float()
        amax = weight.unflatten(1, (-1, BLOCK)).abs().amax(-1) if recipe == "int4" else largest
        tensors = fmt.pack(
            weight, Calibration(weight_amax=amax, input_amax=input_amax, block_size=BLOCK)
        )
        module.weight.data = fmt.unpack(tensors, dtype=torch.float32, shape=weight.shape).double()
        scale = tensors.get("input_scale")

        def round_input(_: Any, args: Any, scale: Tensor | None = scale) -> tuple[Tensor]:
            return (fmt.quantize_activation(args[0].float(), scale).double(),)

        hooks.append(module.register_forward_pre_hook(round_input))
    try:
        yield
    finally:
        for module, weight, hook in zip(modules, kept, hooks, strict=True):
            module.weight.data = weight
            hook.remove()


@pytest.mark.parametrize("recipe", ["int4", "fp8"])
def test_every_group_alone(recipe: str, tiny_model: Path) -> None:
    expected = reference(tiny_model, recipe)
    found = measured(tiny_model, recipe)
    assert found.keys() == expected.keys()
    for group, value in expected.items():
        # Float32 rounds inputs that lie half-way between two FP8 numbers either way.
        assert found[group] == pytest.approx(value, rel=1e-3 if recipe == "int4" else 0.03), group


def test_factors_of_a_search_cancel_where_quantizers_are_off(tiny_model: Path) -> None:
    with loaded(tiny_model) as (model, context):
        divergence = Divergence(model, [TOKENS], context, vocab_size=300)
        Quantizer(QuantizationConfig("int4_awq", BLOCK)).quantize(
            model, calibration_loop([TOKENS], context)
        )
        nothing = measure_groups(model, [], divergence, description="test")
        for module in model.modules():
            if hasattr(module, "weight_quantizer"):
                module.weight_quantizer.disable()
        assert nothing == {}
        assert divergence.measure(model) < 1e-6
