"""Structured pruning of Megatron-Core and NeMo 2 language models, proved before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimtron_prune.__about__ import __version__
from slimtron_prune.config import PruningConfig

if TYPE_CHECKING:
    from slimtron_prune.pruner import prune_language_model, save_pruned_model

__all__ = [
    "PruningConfig",
    "__version__",
    "prune_language_model",
    "save_pruned_model",
]


def __getattr__(name: str) -> Any:
    # The pruner needs torch, which a command's --help must not wait for.
    if name in __all__:
        from slimtron_prune import pruner

        return getattr(pruner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
