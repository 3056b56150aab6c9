"""Whether the files say what the model in memory computed."""

from __future__ import annotations

from pathlib import Path

from slimtron_common.errors import VerificationError
from slimtron_common.evaluation import Evaluation

__all__ = ["TOLERANCE", "check_agreement"]

TOLERANCE = 1e-3
"""Largest relative difference between the perplexities of the files and of the model in memory.
The weights are the same; a resumed run may have measured the latter in another layout."""


def check_agreement(memory: Evaluation, exported: Evaluation, *, where: Path) -> None:
    """Compares the reloaded export with the model that was written.

    Args:
        memory: The student in memory.
        exported: The reloaded export, on the same text.
        where: The export, for the message.

    Raises:
        VerificationError: The two are not the same model.
    """
    if not abs(exported.perplexity / memory.perplexity - 1) <= TOLERANCE:
        raise VerificationError(
            "the export, reloaded, is not the model that was in memory",
            where=where,
            found=f"perplexity {exported.perplexity:.6g} reloaded, {memory.perplexity:.6g} in "
            "memory",
            allowed=f"a relative difference of {TOLERANCE}",
            hint="the files are kept for inspection; please report this as a bug",
        )
