"""Structured pruning of Megatron-Core and NeMo 2 language models, proved before and after."""

from __future__ import annotations

from slimtron_prune.__about__ import __version__

__all__ = ["__version__"]
