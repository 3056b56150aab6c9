"""Knowledge distillation of Megatron-Core and NeMo 2 language models, at any parallelism."""

from __future__ import annotations

from slimtron_distill.__about__ import __version__

__all__ = ["__version__"]
