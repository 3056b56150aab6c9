"""NeMo 2's objects around a Megatron-Core model: data modules and Lightning models."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import Tensor

from slimtron_common.errors import ConfigError
from slimtron_common.parallel import ParallelContext

__all__ = ["is_data_module", "record_sizes", "token_batches"]

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
    "moe_ffn_hidden_size",
)


def is_data_module(data: object) -> bool:
    """Tells whether ``data`` is one of Lightning's data modules, without importing Lightning."""
    return hasattr(data, "train_dataloader")


def token_batches(data: Any, trainer: Any, context: ParallelContext) -> list[Tensor]:
    """Reads this data-parallel rank's tokens off the training part of a NeMo data module.

    Args:
        data: NeMo's data module. It is copied, and stays as it was.
        trainer: Its ``limit_val_batches`` global batches are read, as NeMo did; a fraction is one
            of all.
        context: This process's place.

    Returns:
        Token ids, each ``[b, s]``.

    Raises:
        ConfigError: There is no trainer.
    """
    if trainer is None:
        raise ConfigError(
            "says how much of the data module is read",
            where="trainer",
            found=None,
            hint="pass the nl.Trainer that set up the model, with limit_val_batches=",
        )
    module = copy.copy(data)
    module.trainer = trainer
    sampler = module.data_sampler = copy.copy(data.data_sampler)
    module.prepare_data()
    module.setup("fit")
    loader = sampler.transform_dataloader(module.train_dataloader())
    limit = trainer.limit_val_batches
    if isinstance(limit, float):
        count = int(limit * len(loader))
    else:
        share = sampler.global_batch_size // (sampler.micro_batch_size * context.dp_size)
        count = limit * max(share, 1)
    return [batch["tokens"] for batch in itertools.islice(loader, count)]


def record_sizes(model: Any, config: Any) -> None:
    """Writes a pruned model's sizes into what NeMo saves of it.

    Args:
        model: NeMo's model or its ``MegatronParallel``; others are left alone.
        config: The pruned model's.
    """
    if hasattr(model, "__io__"):
        for name in _SIZES:
            setattr(model.__io__.config, name, getattr(config, name))
