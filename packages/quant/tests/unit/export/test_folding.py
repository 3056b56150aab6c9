"""A factor moved into a norm changes nothing that the model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_quant.export.folding import fold_input_factors, input_factor


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


@pytest.mark.parametrize("family", ["llama", "gemma", "nemotron", "mixtral"])
def test_the_model_stays_the_same(family: str, context: ParallelContext, tmp_path: Path) -> None:
    """Norms that hold what is added to 1, norms with a bias, and experts behind a router."""
    path = write_tiny_model(tmp_path / "m", family, tokenizer=False, num_hidden_layers=1)
    checkpoint = open_checkpoint(f"hf:{path}")
    model = build_model(checkpoint.architecture, context, dtype=torch.float32, layer_spec="local")
    checkpoint.load(model, context)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        found: list[Tensor] = []
        forward_only(model, [tokens], context, lambda _, x: found.append(x.clone()))
        return found[0]

    expected = logits()
    mtq.quantize(model, {**copy.deepcopy(mtq.INT4_AWQ_CFG), "algorithm": None})
    scaled = []
    for name, module in model.named_modules():
        if hasattr(module, "weight_quantizer") and "output_layer" not in name:
            module.weight_quantizer.disable()
            if hasattr(module, "weight") and "router" not in name:
                factor = torch.rand(module.weight.shape[1]) + 0.5
                module.weight.data /= factor
                module.input_quantizer._enable_pre_quant_scale = True
                module.input_quantizer.pre_quant_scale = factor
                scaled.append((name, module))
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
    fold_input_factors(model, checkpoint.architecture, dtype=torch.float32)
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
    left = {name.rpartition(".")[2] for name, module in scaled if input_factor(module) is not None}
    assert left == {"linear_proj", "linear_fc2"} | (
        {"linear_fc1"} if family == "mixtral" else set()
    )
