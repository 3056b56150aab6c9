"""A run that was interrupted goes on in another layout, and ends as one that was not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimtron_common.parallel import ParallelConfig
from slimtron_common.report import read_report
from slimtron_common.testing import run_ranks
from slimtron_distill.job.config import DistillJobConfig, LogConfig
from slimtron_distill.job.export import export_checkpoint
from slimtron_distill.job.preflight import preflight
from slimtron_distill.job.run import run
from slimtron_distill.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from slimtron_distill.training.trainer import Trainer

STEPS = 6

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)},
    "pipeline": {"parallel": ParallelConfig(pipeline_parallel_size=2)},
    "interleaved": {
        "parallel": ParallelConfig(pipeline_parallel_size=2),
        "virtual_pipeline_size": 2,
    },
    "context": {"parallel": ParallelConfig(context_parallel_size=2)},
    "data": {"training.recompute": "selective"},
}


def _config(student: Path, teacher: Path, output: Path) -> DistillJobConfig:
    from slimtron_common.evaluation.config import EvaluationConfig
    from slimtron_distill.config import DistillationConfig

    return DistillJobConfig(
        student=f"hf:{student}",
        teacher=f"hf:{teacher}",
        output=output,
        training=TrainingConfig(steps=STEPS, seq_length=16, global_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoints=CheckpointConfig(interval=3, asynchronous=False),
        logging=LogConfig(evaluation_interval=None),
        evaluation=EvaluationConfig(num_tokens=64, seq_length=16),
        # The projections of narrower hidden states are trained, and go on, too.
        distillation=DistillationConfig(
            intermediate_layer_pairs=(("decoder.layers.1", "decoder.layers.1"),)
        ),
        device="cpu",
    )


def _undisturbed(rank: int, world_size: int, student: Path, teacher: Path, folder: Path) -> None:
    config = _config(student, teacher, folder / "undisturbed")
    run(preflight(config))
    config = _config(student, teacher, folder / "out")

    train_step = Trainer.train_step

    def interrupted(self: Trainer, batches: Any) -> Any:
        if self.step == 4:
            raise KeyboardInterrupt
        return train_step(self, batches)

    Trainer.train_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(preflight(config))
    assert not config.output.exists()
    assert [path.name for path in (folder / "out.work/checkpoints").glob("step-*")] == [
        "step-00000003"
    ]


def _resumed(rank: int, world_size: int, student: Path, teacher: Path, folder: Path) -> None:
    for name, changes in LAYOUTS.items():
        config = _config(student, teacher, folder / name)
        training = replace(config.training, recompute=changes.get("training.recompute", "none"))
        fields = {key: value for key, value in changes.items() if "." not in key}
        config = replace(config, training=training, **fields)
        run(preflight(config, resume=True), resume=True)
    # An unfinished run's student, from two processes that were one.
    export_checkpoint(
        folder / "out",
        f"hf:{folder / 'so-far'}",
        parallel=ParallelConfig(tensor_parallel_size=2),
        device="cpu",
    )


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_run_goes_on_in_another_layout(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    run_ranks(_undisturbed, 1, tiny_student, tiny_teacher, tmp_path)
    for name in LAYOUTS:
        shutil.copytree(tmp_path / "out.work", tmp_path / f"{name}.work")
        identity = tmp_path / f"{name}.work/identity.json"
        identity.write_text(identity.read_text().replace(f"{tmp_path}/out", f"{tmp_path}/{name}"))
    run_ranks(_resumed, 2, tiny_student, tiny_teacher, tmp_path)

    start = _weights(tiny_student)
    expected = _weights(tmp_path / "undisturbed")
    so_far = _weights(tmp_path / "so-far")
    assert any((so_far[key] - start[key]).abs().max() > 1e-4 for key in start)
    reference = read_report(tmp_path / "undisturbed").columns[1].metrics
    for name in LAYOUTS:
        found = _weights(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            moved = (value - start[key]).abs().max()
            # Sums in another order; 1e-5 was seen.
            assert (found[key] - value).abs().max() <= 1e-3 * moved, (name, key)
        metrics = read_report(tmp_path / name).columns[1].metrics
        assert torch.isclose(
            torch.tensor(metrics["perplexity"]), torch.tensor(reference["perplexity"]), rtol=1e-5
        )
        assert metrics["kl"] != 0
