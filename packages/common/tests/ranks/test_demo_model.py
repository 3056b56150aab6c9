"""SmolLM2 with its real weights, in Megatron-Core and in transformers."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.distributed as dist
import transformers

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, forward_only, initialize_parallel
from slimtron_common.testing import run_ranks

pytestmark = pytest.mark.model

NUM_TOKENS = 512


def _tokens(path: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(tokenizer(text[:4000])["input_ids"][:NUM_TOKENS]).view(1, NUM_TOKENS)


def _logits(rank: int, world_size: int, path: Path, layout: ParallelConfig) -> torch.Tensor | None:
    checkpoint = open_checkpoint(f"hf:{path}")
    found = []
    with initialize_parallel(layout, device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        forward_only(model, [_tokens(path)], context, lambda _, logits: found.append(logits))
        if not found:
            return None
        shards = [torch.empty_like(found[0]) for _ in range(context.tp_size)]
        dist.all_gather(shards, found[0], group=context.tp_group)
        return torch.cat(shards, -1)


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model).float()
    with torch.no_grad():
        return model(_tokens(demo_model)).logits


@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(),
        ParallelConfig(tensor_parallel_size=3),
        ParallelConfig(pipeline_parallel_size=2),
    ],
    ids=["tp1", "tp3", "pp2"],
)
def test_logits_are_those_of_transformers(
    demo_model: Path, reference: torch.Tensor, layout: ParallelConfig
) -> None:
    results = run_ranks(_logits, layout.model_parallel_size, demo_model, layout)
    found = [result for result in results if result is not None]
    assert len(found) == layout.tensor_parallel_size
    for logits in found:
        assert float((logits - reference).abs().max()) <= 1e-3
        assert torch.equal(logits.argmax(-1), reference.argmax(-1))
