"""Scores and pruning with Transformer Engine's modules, beside Megatron-Core's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_prune import PruningConfig, prune_language_model
from slimtron_prune.scoring.collect import collect_scores

HYBRID = PruningConfig(64, 48, 2, 2, target_mamba_num_heads=4, target_num_layers=5)


@pytest.mark.parametrize("family", ["llama", "gemma", "nemotron", "nemotron_h"])
def test_both_layer_specs_make_the_same_model(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    write_tiny_model(tmp_path / "m", family, tokenizer=False)
    checkpoint = open_checkpoint(f"hf:{tmp_path / 'm'}")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 299, (2, 32), generator=generator) for _ in range(2)]
    sums, logits = [], []
    with initialize_parallel(device="cuda") as context:
        for spec in ("local", "transformer_engine"):
            model = build_model(
                checkpoint.architecture, context, dtype=torch.float32, layer_spec=spec
            )
            checkpoint.load(model, context)
            scores = collect_scores(model, batches, checkpoint.architecture, context)
            sums.append(scores.sums)
            config = PruningConfig(64, 48, 2, 2, target_num_layers=3)
            prune_language_model(model, HYBRID if family == "nemotron_h" else config, batches)
            forward_only(model, batches[:1], context, lambda _, x: logits.append(x.float().cpu()))
    for name, value in sums[0].items():
        # TF32 products, in other orders.
        torch.testing.assert_close(sums[1][name], value, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-2, atol=2e-2)
