"""SmolLM2: real weights, every kind of cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimtron_common.report import read_report
from slimtron_prune.__main__ import main

LAYER = 2 * 576 + 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
TARGETS = {
    "ffn": (("--ffn-hidden-size", "1024"), 30 * 3 * 576 * 512),
    "layers": (("--num-layers", "26"), 4 * LAYER),
    "heads": (
        ("--num-attention-heads", "6", "--num-query-groups", "2"),
        30 * 576 * (2 * 3 * 64 + 2 * 64),
    ),
    # Everything is proportional to the hidden size.
    "hidden": (("--hidden-size", "512"), 134_515_008 // 9),
}


@pytest.mark.model
@pytest.mark.timeout(1800)
def test_parameters_are_exact_and_quality_is_kept(demo_model: Path, tmp_path: Path) -> None:
    text = ("--data", "pydoc", "--device", "cpu")
    scoring = ("--score-tokens", "2048", "--score-batch-size", "2")
    model = ("--model", f"hf:{demo_model}")
    scores = tmp_path / "scores"
    assert main(["score", *model, "--out", str(scores), *text, *scoring]) == 0
    found = {}
    for name, (sizes, removed) in TARGETS.items():
        out = tmp_path / name
        evaluation = ("--eval-tokens", "1024", "--eval-data", str(_held_out(tmp_path)))
        command = [*model, *sizes, "--scores", str(scores), "--out", str(out)]
        assert main(["run", *command, *text, *evaluation]) == 0
        report = read_report(out)
        original, pruned = report.columns
        assert pruned.metrics["num_parameters"] == 134_515_008 - removed
        stored = load_file(out / "model.safetensors").values()
        assert sum(tensor.numel() for tensor in stored) == 134_515_008 - removed
        # The job has compared transformers' logits with Megatron-Core's within 1e-3.
        assert report.facts["Compared with transformers"].startswith("logits differ by")
        found[name] = pruned.metrics["perplexity"] / original.metrics["perplexity"]
    # A tenth of the layers, a third of the channels: worse, and far from broken.
    assert all(1 < ratio < 3 for ratio in found.values()), found


def _held_out(folder: Path) -> Path:
    import json.decoder

    path = folder / "held-out.txt"
    source = Path(json.decoder.__file__).read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    return path
