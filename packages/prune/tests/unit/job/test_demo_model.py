"""SmolLM2: real weights, every kind of cut at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from slimtron_common.report import read_report
from slimtron_prune.__main__ import main

SIZES = (
    *("--ffn-hidden-size", "1024", "--hidden-size", "512", "--num-layers", "26"),
    *("--num-attention-heads", "6", "--num-query-groups", "2"),
)
# A layer's two norms, query and output projections, keys and values, and feed-forward network.
LAYER = 2 * 512 + 2 * 512 * 6 * 64 + 2 * 512 * 2 * 64 + 3 * 512 * 1024


@pytest.mark.model
@pytest.mark.timeout(1800)
def test_a_real_model_stays_one(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        *("run", "--model", f"hf:{demo_model}", "--out", str(out), *SIZES, "--device", "cpu"),
        *("--data", "pydoc", "--score-tokens", "2048", "--score-batch-size", "2"),
        *("--eval-tokens", "1024"),
    ]
    assert main(command) == 0
    report = read_report(out)
    original, pruned = report.columns
    expected = 49152 * 512 + 26 * LAYER + 512
    assert pruned.metrics["num_parameters"] == expected
    assert sum(t.numel() for t in load_file(out / "model.safetensors").values()) == expected
    # The job has compared transformers' logits with Megatron-Core's.
    assert report.facts["Compared with transformers"].startswith("logits differ by")
    # Half of the layers' weights are gone, and nothing was trained: chance would be thousands.
    ratio = pruned.metrics["perplexity"] / original.metrics["perplexity"]
    assert 1 < ratio < 30
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizer("import sys", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).shape[1] > prompt.shape[1]
