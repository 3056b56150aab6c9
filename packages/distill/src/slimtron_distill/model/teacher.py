"""Open the teacher."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.base import Checkpoint
from slimtron_common.checkpoint.megatron import load_distributed
from slimtron_common.integrations.modelopt_weights import keep_codes
from slimtron_common.models.megatron import LayerSpec, build_chunks
from slimtron_common.parallel import ParallelContext

__all__ = ["load_teacher", "teacher_provider"]

logger = logging.getLogger(__name__)


def load_teacher(
    checkpoint: Checkpoint,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    vocab_size: int,
    layer_spec: LayerSpec = "auto",
) -> list[nn.Module]:
    """Builds this process's part of the teacher and fills it.

    Args:
        checkpoint: The teacher.
        context: This process's place.
        dtype: Type of its weights.
        vocab_size: Entries of the student's vocabulary. The teacher's is padded or cut to it, so
            that at every tensor-parallel size the processes' logits are those of the same tokens.
        layer_spec: As ``build_model`` takes it.

    Returns:
        Its virtual pipeline chunks, or the one model, in eval mode and without gradients. Those of
        a quantized teacher hold INT8 and FP8 weights as such.
    """
    fitted = copy.copy(checkpoint)
    fitted.architecture = dataclasses.replace(checkpoint.architecture, vocab_size=vocab_size)
    chunks = build_chunks(fitted.architecture, context, dtype=dtype, layer_spec=layer_spec)
    for chunk in chunks:
        fitted.load(chunk, context)
        if fitted.is_quantized:
            keep_codes(chunk)
    _free()
    return chunks


def teacher_provider(
    config: Any, ckpt_path: str | Path, tokenizer: Any, trainer: Any = None
) -> nn.Module:
    """Builds a teacher from NeMo 2's config of it and fills it from a checkpoint.

    Megatron's model-parallel groups must exist. NeMo itself need not be installed: any config
    with NeMo's ``configure_model`` will do.

    Args:
        config: ``llm.GPTConfig``, its parallel sizes those of the student's.
        ckpt_path: A NeMo 2 checkpoint or a bare Megatron distributed one, saved at any layout; or
            ``megatron:DIR`` and ``hf:DIR``, as every command of Slimtron takes them.
        tokenizer: NeMo's tokenizer, from which a config without ``vocab_size`` takes its own.
        trainer: Not used; NeMo's function read through it.

    Returns:
        Megatron-Core's ``GPTModel`` in eval mode and without gradients.

    Raises:
        CheckpointError: The weights are missing, damaged, or those of another model.
    """
    logger.info("loading the teacher from %s", ckpt_path)
    model: nn.Module = config.configure_model(tokenizer)
    kind, colon, _ = str(ckpt_path).partition(":")
    if colon and kind in ("hf", "megatron"):
        context = ParallelContext.from_megatron(sequence_parallel=config.sequence_parallel)
        open_checkpoint(str(ckpt_path), where="ckpt_path").load(model, context)
    else:
        path = Path(ckpt_path)
        load_distributed(model, path / "weights" if (path / "weights").is_dir() else path)
    _free()
    return model.requires_grad_(False).eval()


def _free() -> None:
    """Gives back the memory that loading took."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
