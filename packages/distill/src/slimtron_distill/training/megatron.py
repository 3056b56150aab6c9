"""Megatron-Core's data parallelism, optimizer and schedule, as a training here needs them."""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slimtron_common.integrations import megatron_core
from slimtron_distill.training.config import OptimizerConfig

with warnings.catch_warnings():
    # They tell on import which of their optional kernels are missing.
    warnings.simplefilter("ignore")
    from megatron.core import distributed
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

__all__ = ["build_optimizer", "build_scheduler", "finalize_model_grads", "wrap_chunks"]

finalize_model_grads = distributed.finalize_model_grads


def wrap_chunks(chunks: Sequence[nn.Module]) -> list[Any]:
    """Puts each chunk into Megatron's data parallel, with gradients kept and reduced in fp32."""
    config = distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    return [
        distributed.DistributedDataParallel(
            config=chunk.config, ddp_config=config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(settings: OptimizerConfig, chunks: list[Any]) -> Any:
    """Makes a distributed AdamW with fp32 weights for chunks in Megatron's data parallel."""
    dtype = next(p.dtype for chunk in chunks for p in chunk.parameters())
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
    optimizer = megatron_core.build_optimizer(config, chunks)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _make_loadable(part)
    return optimizer


def build_scheduler(settings: OptimizerConfig, optimizer: Any, *, steps: int) -> Any:
    """Makes the schedule of the learning rate over ``steps`` updates."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def _make_loadable(part: Any) -> None:
    """Mends what Megatron's checkpoints of a distributed optimizer lack for torch's AdamW.

    They read the state of its first step before there is one. On loading they ask each weight's
    saved state for the number of steps, which is saved once for all, and let all weights share one
    counter, which every weight's update would then increase.
    """
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            part.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    load = part._set_main_param_and_optimizer_states

    def load_with_step(self: Any, parameter: nn.Parameter, tensors: dict[str, Any]) -> None:
        group, index = self.model_param_group_index_map[parameter]
        main = self.optimizer.param_groups[group]["params"][index]
        state = self.optimizer.state[main]
        state["step"] = state["step"].clone()
        load(parameter, {"step": state["step"], **tensors})

    part._set_main_param_and_optimizer_states = types.MethodType(load_with_step, part)
