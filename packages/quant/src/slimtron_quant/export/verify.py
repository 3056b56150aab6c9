"""Whether the files say what the model in memory computed."""

from __future__ import annotations

from pathlib import Path

from slimtron_common.errors import VerificationError
from slimtron_common.evaluation import Evaluation

__all__ = ["PERPLEXITY_TOLERANCE", "check_agreement"]

PERPLEXITY_TOLERANCE = 0.01
"""Largest relative difference between the perplexities of the export and of the model in
memory. The weights are the same to the last bit; where inputs are rounded too, one that lies
half-way and falls the other way changes those of every layer after it."""


def check_agreement(memory: Evaluation, exported: Evaluation, *, where: Path) -> None:
    """Compares the reloaded export with the model that was written.

    Args:
        memory: The quantized model in memory.
        exported: The reloaded export, with its distance to ``memory``.
        where: The export, for the message.

    Raises:
        VerificationError: The two are not the same model.
    """
    change = exported.perplexity / memory.perplexity - 1
    if not abs(change) <= PERPLEXITY_TOLERANCE:
        raise VerificationError(
            "the export, reloaded, is not the model that was in memory",
            where=where,
            found=f"perplexity {exported.perplexity:.4f} reloaded, {memory.perplexity:.4f} in "
            f"memory, KL {exported.distances['memory'].kl:.3g} nats",
            allowed=f"a difference of {PERPLEXITY_TOLERANCE:.0%}",
            hint="the files are kept for inspection; please report this as a bug",
        )
