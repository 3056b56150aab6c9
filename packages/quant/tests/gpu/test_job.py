"""The whole job on a GPU, on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtron_common.models.megatron import transformer_engine_available
from slimtron_common.report import read_report
from slimtron_quant.__main__ import main

pytestmark = pytest.mark.model

CASES = [
    ("fp8", "local", 1.06),
    ("int8", "local", 3.0),
    ("int8_sq", "local", 1.3),
    ("int4", "local", 2.0),
    ("int4_awq", "local", 1.6),
    ("fp8", "transformer_engine", 1.06),
    ("int4_awq", "transformer_engine", 1.6),
    ("int8_sq", "transformer_engine", 1.3),
]


@pytest.mark.parametrize(("recipe", "layer_spec", "allowed"), CASES)
def test_job(
    recipe: str, layer_spec: str, allowed: float, demo_model: Path, tmp_path: Path
) -> None:
    if layer_spec == "transformer_engine" and not transformer_engine_available():
        pytest.skip("Transformer Engine is not installed")
    out = tmp_path / "out"
    code = main(
        [
            *("run", "--model", f"hf:{demo_model}", "--recipe", recipe, "--out", str(out)),
            *("--data", "pydoc", "--block-size", "auto", "--set", f"layer_spec={layer_spec}"),
            *("--calib-size", "8", "--calib-seq-len", "512", "--calib-batch-size", "2"),
            *("--eval-tokens", "8192", "--eval-batch-size", "2", "--device", "cuda"),
        ]
    )
    assert code == 0
    original, memory, exported = read_report(out).columns
    perplexity = original.metrics["perplexity"]
    print(
        f"\n{recipe:9s} {layer_spec:18s} perplexity {perplexity:.3f}, in memory "
        f"{memory.metrics['perplexity']:.3f}, exported {exported.metrics['perplexity']:.3f}, KL "
        f"{exported.metrics['kl']:.4f}, bits {exported.metrics['bits_per_weight']:.2f}"
    )
    assert 1.0 < exported.metrics["perplexity"] / perplexity < allowed
    assert main(["verify", str(out), "--eval-tokens", "1024"]) == 0


@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
@pytest.mark.parametrize(
    ("recipe", "qformat", "allowed"),
    [
        ("none", "fp8", 1.03),
        ("none", "nvfp4", 1.5),
        ("fp8", "fp8", 1.08),
        ("nvfp4", "nvfp4", 4.0),
    ],
)
def test_kv_cache(
    recipe: str, qformat: str, allowed: float, layer_spec: str, demo_model: Path, tmp_path: Path
) -> None:
    if layer_spec == "transformer_engine" and not transformer_engine_available():
        pytest.skip("Transformer Engine is not installed")
    out = tmp_path / "out"
    code = main(
        [
            *("run", "--model", f"hf:{demo_model}", "--recipe", recipe, "--kv-cache", qformat),
            *("--out", str(out), "--data", "pydoc", "--set", f"layer_spec={layer_spec}"),
            *("--calib-size", "8", "--calib-seq-len", "512", "--calib-batch-size", "2"),
            *("--eval-tokens", "8192", "--eval-batch-size", "2", "--device", "cuda"),
        ]
    )
    assert code == 0
    original, memory, exported = read_report(out).columns
    perplexity = original.metrics["perplexity"]
    print(
        f"\n{recipe:5s} KV {qformat:5s} {layer_spec:18s} perplexity {perplexity:.3f}, in memory "
        f"{memory.metrics['perplexity']:.3f}, exported {exported.metrics['perplexity']:.3f}, KL "
        f"{exported.metrics['kl']:.4f}, to memory {exported.metrics['kl_memory']:.5f}"
    )
    assert 1.0 < exported.metrics["perplexity"] / perplexity < allowed
    assert exported.metrics["kl_memory"] < 0.5 * exported.metrics["kl"]
    assert main(["verify", str(out), "--eval-tokens", "1024"]) == 0
