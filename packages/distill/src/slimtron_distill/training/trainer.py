"""One update of the weights, by Megatron's schedule, data parallelism and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from slimtron_common.parallel import ParallelContext
from slimtron_distill.training.config import GuardConfig, OptimizerConfig, TrainingConfig
from slimtron_distill.training.guard import Guard
from slimtron_distill.training.megatron import (
    build_optimizer,
    build_scheduler,
    finalize_model_grads,
    wrap_chunks,
)
from slimtron_distill.training.task import Batch, Task

__all__ = ["StepResult", "Trainer"]

_TOTAL = "loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One update. The same on every process."""

    losses: dict[str, float]
    """Means over the tokens of the global batch, by name; ``loss`` is what was minimized."""

    grad_norm: float
    """Before clipping."""

    lr: float
    num_tokens: int
    updated: bool
    """Whether the weights changed; False for a step that was left out."""


class Trainer:
    """A task with its optimizer.

    Args:
        task: What to train. Its parameters are moved into Megatron's buffers.
        context: This process's place.
        training: Batch sizes and number of steps.
        optimizer: AdamW's settings.
        guard: What happens to bad updates.
        seed: Seeds what is random in a step.
    """

    def __init__(
        self,
        task: Task,
        context: ParallelContext,
        *,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        guard: GuardConfig,
        seed: int,
    ) -> None:
        self.task = task
        self.context = context
        self.guard = Guard(guard)
        self.step = 0
        """Steps that are done."""
        self._training, self._seed = training, seed
        for chunk in task.chunks:
            config: Any = chunk.config
            config.calculate_per_token_loss = True
            config.finalize_model_grads_func = finalize_model_grads
        self.chunks = wrap_chunks(task.chunks)
        self.optimizer = build_optimizer(optimizer, self.chunks)
        self._scheduler = build_scheduler(optimizer, self.optimizer, steps=training.steps)

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """Computes the gradient of one global batch and updates the weights.

        Args:
            batches: This data-parallel process's micro-batches.

        Raises:
            UnstableTrainingError: The guard stops the run.
        """
        # What a step draws depends on nothing that came before it, so resuming needs no state.
        torch.manual_seed(self._seed + self.step)
        model_parallel_cuda_manual_seed(self._seed + self.step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._reduced(self.task.collect(self._forward_backward(batches)))
        losses = {name: total / max(count, 1.0) for name, (total, count) in sums.items()}
        self._scheduler.num_steps = self.step
        self._scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        updated = self.guard.permits(self.step + 1, losses[_TOTAL], grad_norm)
        if updated:
            self.optimizer.step()
            self.task.observe(losses)
        self.step += 1
        return StepResult(
            losses=losses,
            grad_norm=grad_norm,
            lr=self.optimizer.param_groups[0]["lr"],
            num_tokens=int(sums[_TOTAL][1]),
            updated=updated,
        )

    def _forward_backward(self, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
        several = len(self.chunks) > 1
        iterators = [iter(batches) for _ in self.chunks]
        losses: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
            forward_step_func=self.task.forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self._training.seq_length,
            micro_batch_size=self._training.micro_batch_size,
            forward_only=False,
            adjust_tensor_shapes_fn=self.task.adjust_tensor_shapes_fn,
        )
        return losses

    def _reduced(self, losses: dict[str, torch.Tensor]) -> dict[str, list[float]]:
        sums = torch.stack([value.double() for value in losses.values()])
        dist.all_reduce(sums, group=self.context.dp_cp_group)
        return dict(zip(losses, sums.tolist(), strict=True))
