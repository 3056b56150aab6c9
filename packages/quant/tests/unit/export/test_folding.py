"""A factor moved into what makes the input changes nothing that the model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.versions import needs
from slimtron_quant.export.folding import fold_input_factors, input_factor

TOKENS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def _load(
    family: str, context: ParallelContext, tmp_path: Path, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Architecture]:
    path = write_tiny_model(tmp_path / "m", family, tokenizer=False, num_hidden_layers=1)
    checkpoint = open_checkpoint(f"hf:{path}")
    model = build_model(checkpoint.architecture, context, dtype=dtype, layer_spec="local")
    checkpoint.load(model, context)
    return model, checkpoint.architecture


def _logits(model: nn.Module, context: ParallelContext) -> Tensor:
    found: list[Tensor] = []
    forward_only(model, [TOKENS], context, lambda _, x: found.append(x.clone()))
    return found[0]


def _scale_inputs(model: Any, architecture: Architecture, *, shared: bool) -> dict[str, Any]:
    """Gives every linear layer a factor on its input, its inverse in the weight."""
    scaled = {}
    for name, module in model.named_modules():
        if name.startswith("decoder") and hasattr(module, "weight_quantizer"):
            if not hasattr(module, "weight") or "router" in name:
                continue
            factor = torch.rand(module.weight.shape[1]) + 0.5
            if shared and name.endswith("linear_proj"):
                # Query heads that read the same values have the same factor.
                groups = architecture.num_query_groups
                by_group = factor.view(groups, -1, architecture.head_dim)
                factor = by_group[:, :1].expand_as(by_group).flatten()
            module.weight.data /= factor
            module.input_quantizer._enable_pre_quant_scale = True
            module.input_quantizer.pre_quant_scale = factor.to(module.weight.dtype)
            scaled[name] = module
    return scaled


def _left(scaled: dict[str, Any]) -> set[str]:
    return {n.rpartition(".")[2] for n, m in scaled.items() if input_factor(m) is not None}


@pytest.mark.parametrize("shared", [False, True], ids=["by head", "by group"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "nemotron", "mixtral"])
def test_the_model_stays_the_same(
    family: str, shared: bool, context: ParallelContext, tmp_path: Path
) -> None:
    """Norms with an offset or a bias, biased values, squared ReLU, experts behind a router."""
    model, architecture = _load(family, context, tmp_path)
    expected = _logits(model, context)
    mtq.quantize(model, {**copy.deepcopy(mtq.INT4_AWQ_CFG), "algorithm": None})
    scaled = _scale_inputs(model, architecture, shared=shared)
    for module in scaled.values():
        module.weight_quantizer.disable()
    torch.testing.assert_close(_logits(model, context), expected, rtol=1e-4, atol=1e-4)
    fold_input_factors(model, architecture, dtype=torch.float32)
    torch.testing.assert_close(_logits(model, context), expected, rtol=1e-4, atol=1e-4)
    experts = {"linear_fc1"} if family == "mixtral" else set()
    assert _left(scaled) == experts | (set() if shared else {"linear_proj"})


@needs("nvidia-modelopt", "0.47", what="set_quantizer_attributes_full")
@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_codes_of_a_quantized_producer_stay(
    family: str, context: ParallelContext, tmp_path: Path
) -> None:
    """INT4 in blocks: a single code that fell the other way would show in the logits."""
    model, architecture = _load(family, context, tmp_path)
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    mtq.quantize(model, {**config, "algorithm": None})
    mtq.set_quantizer_attributes_full(
        model, "*weight_quantizer", mtq.config.QuantizerAttributeConfig(
            num_bits=4, block_sizes={-1: 16, "type": "static"}
        ),
    )  # fmt: skip
    model.output_layer.weight_quantizer.disable()
    scaled = _scale_inputs(model, architecture, shared=True)
    mtq.calibrate(model, "max")
    expected = _logits(model, context)
    fold_input_factors(model, architecture, dtype=torch.float32)
    assert _left(scaled) == set()
    torch.testing.assert_close(_logits(model, context), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "dtype", "written"),
    [
        # One scale for all output channels, after the blocks' own.
        ("W4A8_AWQ_BETA_CFG", torch.float32, torch.float32),
        # 8-bit codes times a factor, rounded to 8 bits of mantissa.
        ("INT8_SMOOTHQUANT_CFG", torch.bfloat16, torch.bfloat16),
        # An original weight would be rounded once more.
        (None, torch.float32, torch.bfloat16),
    ],
)
def test_factors_that_would_round_the_producer_stay(
    config: str | None,
    dtype: torch.dtype,
    written: torch.dtype,
    context: ParallelContext,
    tmp_path: Path,
) -> None:
    model, architecture = _load("llama", context, tmp_path, dtype)
    chosen = copy.deepcopy(getattr(mtq, config or "INT4_AWQ_CFG"))
    mtq.quantize(model, {**chosen, "algorithm": None})
    scaled = _scale_inputs(model, architecture, shared=True)
    for module in scaled.values():
        if config is None:
            module.weight_quantizer.disable()
    before = model.decoder.layers[0].mlp.linear_fc1.weight.clone()
    fold_input_factors(model, architecture, dtype=written)
    assert _left(scaled) == {"linear_proj", "linear_fc2"}
    assert torch.equal(model.decoder.layers[0].mlp.linear_fc1.weight, before)
