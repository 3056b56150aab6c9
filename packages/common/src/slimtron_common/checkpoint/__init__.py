"""Open, load, inspect and save checkpoints of every kind behind one interface."""

from slimtron_common.checkpoint.base import Checkpoint, open_checkpoint, parse_spec
from slimtron_common.checkpoint.huggingface import save_huggingface
from slimtron_common.checkpoint.megatron import save_megatron

__all__ = ["Checkpoint", "open_checkpoint", "parse_spec", "save_huggingface", "save_megatron"]
