"""One layer at a time in several processes: the bytes of the same layout with all layers held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtron_common.config import build_config
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.preflight import preflight
from slimtron_quant.job.run import run

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("llama", {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "data": ("llama", {}),
    "experts": ("mixtral", {"expert_parallel_size": 2}),
}


def _run(rank: int, world_size: int, folder: Path) -> None:
    for name, (model, layout) in LAYOUTS.items():
        for layerwise in (False, True):
            flags = {
                "model": f"hf:{folder / model}",
                "export.path": str(folder / f"{name}-{layerwise}"),
                "device": "cpu",
                "layerwise": layerwise,
                "quantization.algorithm": "int4_awq" if name == "data" else "int8_sq",
                "quantization.awq_block_size": 16,
                "quantization.calibration_dataset": "pydoc",
                "quantization.calibration_dataset_size": 4,
                "quantization.calibration_seq_len": 32,
                "quantization.calibration_batch_size": 2,
                "evaluation.num_tokens": 128,
                "evaluation.seq_length": 32,
                **{f"parallel.{key}": value for key, value in layout.items()},
            }
            run(preflight(build_config(QuantJobConfig, flags=flags)))


def test_the_bytes_are_the_same(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        write_tiny_model(tmp_path / family, family, num_hidden_layers=3, tie_word_embeddings=True)
    run_ranks(_run, 2, tmp_path)
    for name in LAYOUTS:
        whole, layerwise = tmp_path / f"{name}-False", tmp_path / f"{name}-True"
        for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
            assert (layerwise / file).read_bytes() == (whole / file).read_bytes(), (name, file)
