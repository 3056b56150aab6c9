"""Load a pruned Hugging Face directory with transformers and compare logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimtron_common.errors import MissingDependencyError, VerificationError
from slimtron_common.models import Architecture
from slimtron_common.parallel import ParallelContext, forward_only

__all__ = ["check_against_transformers", "check_known"]

_SEQ_LENGTH = 48
TOLERANCE = 1e-3
"""Of float32's logits; coarser types get as much as their resolution is worse."""


def check_known(architecture: Architecture) -> None:
    """Refuses what the installed transformers cannot compute.

    Raises:
        MissingDependencyError: It is too old for the family.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if architecture.family not in CONFIG_MAPPING_NAMES:
        raise MissingDependencyError(
            f"transformers does not know {architecture.family} yet, to compare the output with",
            where="export.check_transformers",
            found=f"transformers {__version__}",
            hint="pip install --upgrade transformers, or leave the comparison out: "
            "--set export.check_transformers=false",
        )


def check_against_transformers(
    directory: Path, model: Any, architecture: Architecture, context: ParallelContext
) -> float:
    """Compares the logits of transformers' model, in float32, with those of Megatron-Core's.

    All processes call it; the main one loads transformers' model on the CPU.

    Args:
        directory: The Hugging Face directory.
        model: The Megatron-Core model that was loaded from it.
        architecture: What it is.
        context: This process's place.

    Returns:
        The largest difference.

    Raises:
        VerificationError: It is too large.
    """
    length = min(_SEQ_LENGTH, architecture.max_position_embeddings)
    if architecture.hybrid is not None:
        # Beyond a chunk, the scan of transformers up to 5.14 forgets what it should hand on.
        length = min(length, int(architecture.hf_extras.get("chunk_size", length)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(architecture.vocab_size, (1, length), generator=generator)
    expected = torch.empty(1, length, architecture.vocab_size, device=context.device)
    if context.is_main:
        # Its kernels have no shortest time step; without them it takes that of the training.
        options = {} if architecture.hybrid is None else {"time_step_min": 0.0}
        expected.copy_(_transformers_logits(directory, tokens, **options))
    dist.broadcast(expected, src=0)
    found = torch.zeros(3, device=context.device)

    def compare(_: int, logits: Tensor) -> None:
        start = context.tp_rank * logits.shape[-1]
        own = expected[..., start : start + logits.shape[-1]]
        difference = (logits[..., : own.shape[-1]].float() - own).abs().max()
        # A NaN is no number to compare with.
        found[0] = torch.nan_to_num(difference, nan=torch.inf)
        found[1] = own.abs().max()

    forward_only(model, [tokens], context, compare)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    difference, largest = found[0].item(), found[1].item()
    epsilon = torch.finfo(next(model.parameters()).dtype).eps
    # Rounding adds up over the layers.
    allowed = max(TOLERANCE, 4 * epsilon * largest if epsilon > 1e-6 else 0.0)
    if not difference <= allowed:
        raise VerificationError(
            "transformers computes other logits from the files than Megatron-Core",
            where=directory,
            found=f"a difference of {difference:.3g} among logits up to {largest:.3g}",
            allowed=f"{allowed:.3g}",
            hint="the files are kept; report it with the model's config.json",
        )
    return difference


def _transformers_logits(directory: Path, tokens: Tensor, **options: float) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, **options
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens, use_cache=False).logits.float()
    return logits
