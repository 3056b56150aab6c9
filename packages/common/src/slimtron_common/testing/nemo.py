"""NeMo 2 itself on the CPU, for tests of what its users hold in their hands.

NeMo expects Transformer Engine and a GPU: what needs them is switched off here, in the config of
the model and never in the files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from slimtron_common.backend.cpu import cpu_backend

__all__ = ["build_in_nemo", "cpu_trainer", "nemo_on_cpu", "nemo_test", "open_in_nemo", "train_step"]


def nemo_test(function: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that uses NeMo: skipped without it, and deaf to what it warns of."""
    needs = pytest.mark.skipif(find_spec("nemo") is None, reason="NeMo 2 is not installed")
    # Those of NeMo, Lightning and all that they import.
    quiet = pytest.mark.filterwarnings("ignore")
    marked: Callable[..., None] = needs(quiet(function))
    return marked


_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "persist_layer_norm",
)


@contextlib.contextmanager
def nemo_on_cpu() -> Iterator[None]:
    """Lets NeMo compute on the CPU inside the block, and clears up after it."""
    import numpy

    # Megatron-Core 0.15, which NeMo 2.7 needs, was written for NumPy 1.
    setattr(numpy, "product", numpy.prod)  # noqa: B010 - NumPy 2 does not know the name
    before = dict(os.environ)
    with cpu_backend():
        from nemo.lightning import nemo_logger
        from nemo.lightning.io import pl

        # What moves a checkpoint's tensors to the GPU.
        stay = mock.patch.object(pl, "_fix_tensors_device", lambda checkpoint: checkpoint)
        # A package for clusters, whose class no callback is of.
        absent = mock.patch.object(nemo_logger, "lcp", mock.Mock(LocalCheckpointCallback=()))
        try:
            with stay, absent:
                yield
        finally:
            _forget()
            os.environ.clear()
            os.environ.update(before)


def open_in_nemo(path: Path, **settings: Any) -> tuple[Any, Any]:
    """Opens a checkpoint with NeMo, as ``llm.ptq`` and ``llm.prune`` do.

    Args:
        path: The checkpoint.
        **settings: Of the trainer.

    Returns:
        NeMo's model, its weights loaded, and the trainer, whose strategy has ``megatron_parallel``.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
    from nemo.collections.llm.modelopt import model_utils

    model = build_in_nemo(path)
    trainer = cpu_trainer(
        {"setup_optimizers": False, "ddp": "pytorch", "ckpt_load_optimizer": False}, **settings
    )
    # For a quantized model NeMo takes Transformer Engine's norms.
    keep = mock.patch.object(model_utils, "_set_gpt_mamba_modelopt_spec", lambda config: config)
    with keep:
        _setup_trainer_and_restore_model(path, trainer, model)
    model_parallel_cuda_manual_seed(0)
    return model.eval(), trainer


def build_in_nemo(path: Path) -> Any:
    """Builds the model of a checkpoint as NeMo's ``load_context`` does, weights and all to come."""
    import fiddle
    from nemo.lightning import io

    description = io.load_context(path, subpath="model", build=False)
    for name in _FUSIONS:
        if hasattr(description.config.__fn_or_cls__, name):
            setattr(description.config, name, False)
    description.config.use_cpu_initialization = True
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        # An earlier model's kernels of attention.
        del os.environ[name]
    return fiddle.build(description)


def train_step(model: Any) -> tuple[float, float]:
    """Takes a step on one text with what ``open_in_nemo`` opened.

    Returns:
        The loss before and after it.
    """
    import torch

    tokens = torch.arange(17).reshape(1, 17)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    model.requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        positions = torch.arange(16).reshape(1, 16)
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[1]


def cpu_trainer(strategy: dict[str, Any], **settings: Any) -> Any:
    """Makes NeMo's trainer for one process.

    Args:
        strategy: Arguments of ``MegatronStrategy``.
        **settings: Arguments of ``Trainer``.
    """
    from nemo import lightning as nl

    gloo = nl.MegatronStrategy(process_group_backend="gloo", ckpt_async_save=False, **strategy)
    defaults = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return nl.Trainer(accelerator="cpu", devices=1, strategy=gloo, **{**defaults, **settings})


def _forget() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    unset_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    getattr(Singleton, "_Singleton__instances", {}).pop(AppState, None)
