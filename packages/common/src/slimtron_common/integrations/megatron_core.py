"""What Megatron-Core's versions disagree on.

Where a distributed checkpoint's common state lies: beside the sharded tensors a checkpoint has
one more object, which every process reads. Up to 0.16 it is the file ``common.pt``; 0.19 keeps it
among the tensors, and reads either. It holds no weight, so 0.16 is told not to open it.

And modules that some versions leave without a name that they use.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "COMMON_STATE",
    "build_optimizer",
    "import_moe_utils",
    "import_transformer_config",
    "load_sharded",
    "prefixed",
    "save_common_state",
]

COMMON_STATE = "common.pt"

K = TypeVar("K")


def build_optimizer(config: Any, chunks: list[Any]) -> Any:
    """Makes Megatron's optimizer, in which biases and norms do not decay.

    Megatron-Core 0.15 decides so itself; later versions are told, and then it is in the config.

    Args:
        config: Megatron's ``OptimizerConfig``.
        chunks: The chunks of this process's pipeline stage, inside ``DistributedDataParallel``.
    """
    from megatron.core import optimizer

    options: dict[str, Any] = {}
    if hasattr(optimizer, "get_standard_config_overrides"):
        options["config_overrides"] = optimizer.get_standard_config_overrides(config)
    return optimizer.get_megatron_optimizer(config, chunks, **options)


def import_moe_utils() -> Any:
    """Imports the module that a mixture of experts computes with, complete.

    Megatron-Core 0.16's router asks whether ``te_general_gemm`` is there, but only Transformer
    Engine's presence defines the name. Later versions define it as None.
    """
    module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    vars(module).setdefault("te_general_gemm", None)
    return module


def import_transformer_config() -> Any:
    """Imports the class of a model's config, from modules that are complete.

    Megatron-Core 0.15 warns of tensor and expert parallelism without sequence parallelism, which
    is for training alone, through a module that it does not import.
    """
    vars(importlib.import_module("megatron.core.model_parallel_config"))["warnings"] = warnings
    return importlib.import_module("megatron.core.transformer").TransformerConfig


def prefixed(sharded: dict[K, Any], prefix: str) -> dict[K, Any]:
    """Returns sharded tensors, whose names in the checkpoint start with ``prefix`` now."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    add_prefix_for_sharding(sharded, prefix)
    return sharded


def load_sharded(
    sharded: dict[str, Any], directory: Path, prefix: str = "", *, reader: Any = None
) -> dict[str, Any]:
    """Loads sharded tensors from a ``torch_dist`` checkpoint that any version has written.

    Args:
        sharded: ``ShardedTensor``s by name, as a model's ``sharded_state_dict`` makes them.
        directory: The distributed checkpoint.
        prefix: What the names in the checkpoint start with.
        reader: A strategy that reads tensors of which no process holds the rest, in the place of
            Megatron-Core's, which makes sure that all of each is asked for.

    Returns:
        The tensors under the same names.
    """
    from megatron.core import dist_checkpointing

    options: dict[str, Any] = {}
    if "common_strategy" in inspect.signature(dist_checkpointing.load).parameters:
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

        class NoCommonState(TorchCommonLoadStrategy):  # type: ignore[misc]
            def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
                return {}

        options["common_strategy"] = NoCommonState()
    if reader is not None:
        options.update(sharded_strategy=reader, validate_access_integrity=False)
    names = list(sharded)
    loaded = dist_checkpointing.load(prefixed(sharded, prefix), str(directory), **options)
    # 0.19 adds what lies in an older checkpoint's common state.
    return {name: loaded[name] for name in names if name in loaded}


def save_common_state(state: dict[str, Any], directory: Path) -> None:
    """Writes a distributed checkpoint's common state as every version reads it.

    Args:
        state: What to save.
        directory: Of the checkpoint, or created for one that is common state alone.
    """
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / COMMON_STATE)
    # Up to 0.16 a version asks for the last two, and no later one minds them.
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
