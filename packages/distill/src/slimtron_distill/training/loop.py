"""Steps, checkpoints, measurements and records, until the last step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from slimtron_common.progress import format_duration
from slimtron_distill.training.checkpoint import TrainingCheckpoints
from slimtron_distill.training.guard import UnstableTrainingError
from slimtron_distill.training.log import TrainingLog
from slimtron_distill.training.stream import BatchStream
from slimtron_distill.training.trainer import StepResult, Trainer

__all__ = ["Intervals", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """Steps between two of each."""

    log: int
    checkpoint: int
    evaluation: int | None


def train(
    trainer: Trainer,
    stream: BatchStream,
    checkpoints: TrainingCheckpoints,
    log: TrainingLog | None,
    *,
    steps: int,
    intervals: Intervals,
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Trains from the trainer's step to the last one, which leaves a checkpoint.

    All processes call it.

    Args:
        trainer: What to train.
        stream: Its batches.
        checkpoints: Where its state goes.
        log: Where records go; the main process's.
        steps: The last step.
        intervals: How often to do what.
        evaluate: Measures the student on held-out text.

    Raises:
        UnstableTrainingError: The guard stops the run.
    """
    first, seconds = trainer.step, 0.0
    while trainer.step < steps:
        begin = time.monotonic()
        try:
            result = trainer.train_step(stream.batches(trainer.step))
        except UnstableTrainingError:
            # On every process; a checkpoint that is being written is good.
            checkpoints.finish()
            raise
        elapsed = time.monotonic() - begin
        seconds += elapsed
        step = trainer.step
        checkpoints.poll()
        if log is not None:
            log.write(
                step,
                **result.losses,
                grad_norm=result.grad_norm,
                lr=result.lr,
                tokens_per_second=result.num_tokens / elapsed,
                updated=result.updated,
                skipped=trainer.guard.skipped,
            )
            if step % intervals.log == 0 or step == steps:
                left = seconds / (step - first) * (steps - step)
                _tell(step, steps, result, result.num_tokens / elapsed, left)
        if intervals.evaluation and step % intervals.evaluation == 0 and step < steps:
            found = evaluate()
            if log is not None:
                log.write(step, **found)
                logger.info(
                    "step %d/%d: held out: %s",
                    step,
                    steps,
                    ", ".join(f"{name} {value:.4g}" for name, value in found.items()),
                )
        if step % intervals.checkpoint == 0 or step == steps:
            checkpoints.save(trainer)
    checkpoints.finish()


def _tell(step: int, steps: int, result: StepResult, speed: float, left: float) -> None:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in result.losses.items())
    logger.info(
        "step %d/%d: %s, gradient %.3g, lr %.3g, %s tokens/s, %s left",
        step,
        steps,
        losses,
        result.grad_norm,
        result.lr,
        f"{speed:,.0f}",
        format_duration(left),
    )
