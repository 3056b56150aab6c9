"""Sequences that are cut over processes: scales, codes and perplexities of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimtron_common.config import build_config
from slimtron_common.report import read_report
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.preflight import preflight
from slimtron_quant.job.run import run

CP = {"parallel.context_parallel_size": 2}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "cache": ("llama", {"quantization.enable_kv_cache": True}),
    "smoothquant": ("window", {"quantization.algorithm": "int8_sq"}),
    "awq": ("llama", {"quantization.algorithm": "int4_awq"}),
    "experts": ("experts", {"quantization.algorithm": "fp8"}),
    "layerwise": ("llama", {"layerwise": True}),
}


def _run(rank: int, world_size: int, models: Path, out: Path) -> None:
    for name, (model, flags) in JOBS.items():
        common = {
            "model": f"hf:{models / model}",
            "export.path": str(out / name),
            "device": "cpu",
            "quantization.awq_block_size": 16,
            "quantization.calibration_dataset": "pydoc",
            "quantization.calibration_dataset_size": 3,
            "quantization.calibration_seq_len": 32,
            "quantization.calibration_batch_size": 2,
            "evaluation.num_tokens": 128,
            "evaluation.seq_length": 32,
        }
        layout = CP if world_size > 1 else {}
        if model == "experts" and world_size > 1:
            layout = {**CP, "parallel.expert_parallel_size": 2}
        run(preflight(build_config(QuantJobConfig, flags={**common, **layout, **flags})))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    size = {"num_hidden_layers": 2}
    write_tiny_model(folder / "llama", tie_word_embeddings=True, **size)
    write_tiny_model(folder / "window", "mistral", sliding_window=9, **size)
    write_tiny_model(folder / "experts", "qwen3_moe", **size)
    for number in (1, 2):
        (folder / str(number)).mkdir()
        run_ranks(_run, number, folder, folder / str(number))
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_the_job_is_that_of_one_process(name: str, outputs: Path) -> None:
    one, cut = (read_report(outputs / number / name) for number in ("1", "2"))
    assert "context 2" in cut.facts["Layout"]
    for expected, found in zip(one.columns, cut.columns, strict=True):
        assert found.metrics["num_tokens"] == expected.metrics["num_tokens"] == 4 * 31
        # A half-way input may be rounded the other way where its last bit differs.
        exact = expected.name == "original" or name == "awq"
        tolerance = 1e-6 if exact else 2e-3
        perplexity = pytest.approx(expected.metrics["perplexity"], rel=tolerance)
        assert found.metrics["perplexity"] == perplexity, expected.name
    expected_tensors, found_tensors = (
        load_file(outputs / number / name / "model.safetensors") for number in ("1", "2")
    )
    assert found_tensors.keys() == expected_tensors.keys()
    for key, expected in expected_tensors.items():
        found = found_tensors[key]
        if expected.dtype in (torch.float32, torch.bfloat16):
            torch.testing.assert_close(
                found.float(), expected.float(), rtol=1e-5 if "scale" in key else 1e-2, atol=0,
                msg=lambda text, key=key: f"{key}: {text}",
            )  # fmt: skip
        else:
            wrong = (found.float() != expected.float()).float().mean()
            assert wrong <= (1e-3 if name in ("smoothquant", "awq") else 0), key
    if name == "experts":
        tables = ([t for t in r.tables if "expert" in t.title] for r in (one, cut))
        assert next(tables) == next(tables)
