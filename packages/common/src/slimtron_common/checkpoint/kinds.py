"""The kinds of checkpoint that can be written, and what tells one on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from slimtron_common.checkpoint.huggingface import write_huggingface
from slimtron_common.checkpoint.megatron import WEIGHTS_DIR, write_megatron
from slimtron_common.checkpoint.nemo2 import CONTEXT_DIR, write_nemo2

__all__ = ["KIND_OF_FORMAT", "WRITERS", "kind_of"]

KIND_OF_FORMAT: Mapping[str, str] = {"hf": "hf", "megatron": "megatron", "nemo": "nemo2"}
"""Name of a format in the config of a job -> the kind of checkpoint that it is opened as."""

WRITERS: Mapping[str, Callable[..., None]] = {
    "hf": write_huggingface,
    "megatron": write_megatron,
    "nemo2": write_nemo2,
}
"""By kind; all take ``directory, model, architecture, context, *, dtype, companions``."""


def kind_of(directory: Path) -> str:
    """Tells the kind of a checkpoint that lies in a directory; ``hf`` where nothing else shows."""
    if (directory / CONTEXT_DIR).is_dir():
        return "nemo2"
    return "megatron" if (directory / WEIGHTS_DIR).is_dir() else "hf"
