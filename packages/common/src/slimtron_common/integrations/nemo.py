"""What only NeMo 2 itself can say of its objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["describe_with_nemo", "is_trainer"]


def is_trainer(holder: object) -> bool:
    """Tells whether an object is Lightning's trainer, without importing Lightning."""
    return hasattr(holder, "strategy") and hasattr(holder, "lightning_module")


def describe_with_nemo(trainer: Any) -> Callable[[Path], None]:
    """Returns what writes a ``context``: all that NeMo knows of its trainer's model."""
    from nemo.lightning.io.pl import TrainerContext

    def describe(directory: Path) -> None:
        TrainerContext.from_trainer(trainer).io_dump(directory, yaml_attrs=["model"])

    return describe
