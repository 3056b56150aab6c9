"""Megatron-Core on the GPU computes what transformers computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from slimtron_common.checkpoint import open_checkpoint, save_huggingface
from slimtron_common.models.families import FAMILIES
from slimtron_common.models.megatron import build_model, transformer_engine_available
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model

SPECS = ["local", "transformer_engine"]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel() as context:
        assert context.device.type == "cuda"
        yield context


@pytest.fixture(params=SPECS)
def layer_spec(request: pytest.FixtureRequest) -> str:
    if request.param == "transformer_engine" and not transformer_engine_available():
        pytest.skip("Transformer Engine is not installed")
    return str(request.param)


def _logits(model: torch.nn.Module, tokens: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    found: list[torch.Tensor] = []
    forward_only(model, [tokens], context, lambda _, logits: found.append(logits.float().cpu()))
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(
    family: str, layer_spec: str, context: ParallelContext, tmp_path: Path
) -> None:
    # Transformer Engine's attention wants heads of a multiple of 8 channels and 16-bit floats.
    dtype = torch.float32 if layer_spec == "local" else torch.bfloat16
    path = write_tiny_model(tmp_path / family, family, tokenizer=False, dtype="bfloat16")
    checkpoint = open_checkpoint(f"hf:{path}")
    model = build_model(checkpoint.architecture, context, dtype=dtype, layer_spec=layer_spec)
    checkpoint.load(model, context)
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    found = _logits(model, tokens, context)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path).float()
    with torch.no_grad():
        expected = reference(tokens).logits
    if layer_spec == "local":
        assert float((found - expected).abs().max()) < 2e-3
    else:
        # bfloat16 keeps 8 bits; these random layers amplify the rest.
        assert float((found - expected).norm() / expected.norm()) < 0.05

    # What was loaded is written back to the last bit.
    save_huggingface(tmp_path / "back", model, checkpoint.architecture, context)
    again = open_checkpoint(f"hf:{tmp_path / 'back'}")
    for name in checkpoint.tensors.names:
        if name in again.tensors:
            assert torch.equal(
                again.tensors.read(name).float(), checkpoint.tensors.read(name).float()
            )


@pytest.mark.model
def test_demo_model(demo_model: Path, layer_spec: str, context: ParallelContext) -> None:
    checkpoint = open_checkpoint(f"hf:{demo_model}")
    model = build_model(
        checkpoint.architecture, context, dtype=torch.bfloat16, layer_spec=layer_spec
    )
    checkpoint.load(model, context)
    text = "The capital of France is Paris. The capital of Germany is"
    tokens = torch.tensor([checkpoint.tokenizer()(text)["input_ids"]])
    found = _logits(model, tokens, context)
    reference = transformers.AutoModelForCausalLM.from_pretrained(demo_model).float()
    with torch.no_grad():
        expected = reference(tokens).logits
    assert torch.equal(found[:, -1].argmax(-1), expected[:, -1].argmax(-1))
    assert float((found.log_softmax(-1).exp() - expected.softmax(-1)).abs().sum(-1).mean()) < 0.1
