"""Sensitivities, and what is chosen by them, are those of one process in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtron_common.config import build_config
from slimtron_common.report import read_report
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.preflight import preflight
from slimtron_quant.job.run import run
from slimtron_quant.mixed.sensitivity import SENSITIVITY_NAME, Sensitivity

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "sequence": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_parallel_size": 2},
    "data": {},
}


def _run(rank: int, world_size: int, model: Path, out: Path, names: list[str]) -> None:
    for name in names:
        flags = {
            "model": f"hf:{model}",
            "export.path": str(out / name),
            "device": "cpu",
            "mixed.bits": 6.5,
            "quantization.awq_block_size": 16,
            "quantization.calibration_dataset": "pydoc",
            "quantization.calibration_dataset_size": 5,
            "quantization.calibration_seq_len": 32,
            "quantization.calibration_batch_size": 2,
            "evaluation.num_tokens": 128,
            "evaluation.seq_length": 32,
            **{f"parallel.{key}": value for key, value in LAYOUTS[name].items()},
        }
        run(preflight(build_config(QuantJobConfig, flags=flags)))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    model = write_tiny_model(folder / "model", num_hidden_layers=2, tie_word_embeddings=True)
    for number in (1, 2):
        (folder / str(number)).mkdir()
    run_ranks(_run, 1, model, folder / "1", ["data"])
    run_ranks(_run, 2, model, folder / "2", list(LAYOUTS))
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_sensitivities_and_choice_are_those_of_one_process(name: str, outputs: Path) -> None:
    one, out = outputs / "1" / "data", outputs / "2" / name
    expected, found = (Sensitivity.read(path / SENSITIVITY_NAME) for path in (one, out))
    assert (found.model, found.text) == (expected.model, expected.text)
    for recipe, entry in expected.candidates.items():
        assert found.candidates[recipe].divergence.keys() == entry.divergence.keys()
        for group, value in entry.divergence.items():
            # A float32 sum in another order may round an input the other way.
            near = pytest.approx(value, rel=1e-4 if "awq" in recipe else 0.03)
            assert found.candidates[recipe].divergence[group] == near, (recipe, group)
    choices = [
        {str(row[0]): row[1] for row in read_report(path).tables[1].rows} for path in (one, out)
    ]
    assert choices[0] == choices[1]
    quantization = [(path / "hf_quant_config.json").read_text() for path in (one, out)]
    assert quantization[0] == quantization[1]
