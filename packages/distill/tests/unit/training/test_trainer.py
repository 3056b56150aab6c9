"""Updates that are left out, on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.testing import run_ranks
from slimtron_distill.training.guard import UnstableTrainingError


def _train(rank: int, world_size: int, student: Path, teacher: Path) -> None:
    from slimtron_common.checkpoint import open_checkpoint
    from slimtron_common.models.megatron import build_chunks
    from slimtron_common.parallel import initialize_parallel
    from slimtron_distill.config import DistillationConfig
    from slimtron_distill.model.task import distillation_task
    from slimtron_distill.model.teacher import load_teacher
    from slimtron_distill.training.config import GuardConfig, OptimizerConfig, TrainingConfig
    from slimtron_distill.training.trainer import Trainer

    checkpoint = open_checkpoint(f"hf:{student}")
    with initialize_parallel(device="cpu") as context:
        vocab_size = checkpoint.architecture.vocab_size
        chunks = build_chunks(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(chunks[0], context)
        trainer = Trainer(
            distillation_task(
                chunks,
                load_teacher(
                    open_checkpoint(f"hf:{teacher}"),
                    context,
                    dtype=torch.float32,
                    vocab_size=vocab_size,
                ),
                DistillationConfig(),
                context,
                vocab_size=vocab_size,
            ),
            context,
            training=TrainingConfig(steps=4, seq_length=8, global_batch_size=2),
            optimizer=OptimizerConfig(lr=1e-3),
            guard=GuardConfig(action="skip"),
            seed=0,
        )

        def batches(mask: float = 1.0) -> list[Any]:
            tokens = torch.arange(8)[None]
            return [
                {
                    "tokens": tokens + i,
                    "labels": tokens + i + 1,
                    "loss_mask": torch.full((1, 8), mask),
                    "rows": torch.tensor([i]),
                }
                for i in range(2)
            ]

        def weights() -> torch.Tensor:
            return torch.cat([p.detach().flatten().clone() for p in chunks[0].parameters()])

        before = weights()
        first = trainer.train_step(batches())
        after = weights()
        assert first.updated
        assert first.num_tokens == 16
        assert first.grad_norm > 0
        assert first.lr == pytest.approx(1e-3, rel=0.2)
        assert not torch.equal(before, after)

        bad = trainer.train_step(batches(mask=float("nan")))
        assert not bad.updated
        assert torch.equal(weights(), after)
        assert trainer.guard.skipped == 1

        assert trainer.train_step(batches()).updated
        assert not torch.equal(weights(), after)
        # The schedule goes by steps, left out or not.
        assert trainer.train_step(batches()).lr == pytest.approx(1e-5)

        trainer.guard.config = GuardConfig(action="stop")
        kept = weights()
        with pytest.raises(UnstableTrainingError, match="step 5"):
            trainer.train_step(batches(mask=float("nan")))
        assert torch.equal(weights(), kept)


def test_a_bad_update_does_not_reach_the_weights(tiny_student: Path, tiny_teacher: Path) -> None:
    run_ranks(_train, 1, tiny_student, tiny_teacher)
