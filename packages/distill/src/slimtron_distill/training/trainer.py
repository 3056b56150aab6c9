"""One update of the weights, by Megatron's schedule, data parallelism and optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import nn

from slimtron_common.parallel import ParallelContext
from slimtron_distill.training.config import GuardConfig, OptimizerConfig, TrainingConfig
from slimtron_distill.training.guard import Guard
from slimtron_distill.training.task import Batch, LossFunction, Losses, Task

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
        self.chunks = [_data_parallel(chunk, first=i == 0) for i, chunk in enumerate(task.chunks)]
        self.optimizer = _build_optimizer(optimizer, self.chunks)
        self._scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=training.steps,
            lr_decay_style=optimizer.decay,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=training.steps,
            wd_incr_style="constant",
        )

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
        sums = self._reduced(self._forward_backward(batches))
        losses = {name: total / max(count, 1.0) for name, (total, count) in sums.items()}
        self._scheduler.num_steps = self.step
        self._scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        updated = self.guard.permits(self.step + 1, losses[_TOTAL], grad_norm)
        if updated:
            self.optimizer.step()
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
            forward_step_func=self._forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self._training.seq_length,
            micro_batch_size=self._training.micro_batch_size,
            forward_only=False,
            adjust_tensor_shapes_fn=self.task.adjust_tensor_shapes_fn,
        )
        return losses

    def _forward_step(
        self, iterator: Iterator[Batch], model: nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        output, loss_function = self.task.forward_step(iterator, model)

        def with_total(output: torch.Tensor) -> Losses:
            loss, num_tokens, parts = loss_function(output)
            total = torch.stack([loss.detach().float(), num_tokens.float()])
            # The schedule adds the counts up as integers.
            return loss, num_tokens.int(), {**parts, _TOTAL: total}

        return output, with_total

    def _reduced(self, losses: list[dict[str, torch.Tensor]]) -> dict[str, list[float]]:
        """Sums over micro-batches and processes; the last stage tells the others."""
        message: list[dict[str, list[float]]] = [{}]
        if losses:
            names = sorted(losses[0])
            sums = torch.stack([sum(part[name].double() for part in losses) for name in names])  # type: ignore[misc]
            dist.all_reduce(sums, group=self.context.dp_cp_group)
            message = [dict(zip(names, sums.tolist(), strict=True))]
        if self.context.pp_size > 1:
            last = dist.get_global_rank(self.context.pp_group, self.context.pp_size - 1)
            dist.broadcast_object_list(message, src=last, group=self.context.pp_group)
        return message[0]


def _data_parallel(chunk: nn.Module, *, first: bool) -> DistributedDataParallel:
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    return DistributedDataParallel(
        config=chunk.config, ddp_config=config, module=chunk, disable_bucketing=not first
    )


def _build_optimizer(settings: OptimizerConfig, chunks: list[DistributedDataParallel]) -> Any:
    with warnings.catch_warnings():
        # It tells on import which of its optional kernels are missing.
        warnings.simplefilter("ignore")
        from megatron.core.optimizer import (
            OptimizerConfig as MegatronOptimizerConfig,
            get_megatron_optimizer,
            get_standard_config_overrides,
        )
    dtype = next(chunks[0].parameters()).dtype
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(
        config, chunks, config_overrides=get_standard_config_overrides(config)
    )
