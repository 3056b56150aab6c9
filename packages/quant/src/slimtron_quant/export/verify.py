"""Whether the files say what the model in memory computed."""

from __future__ import annotations

import math
from pathlib import Path

from slimtron_common.errors import VerificationError
from slimtron_common.evaluation import Evaluation

__all__ = ["PERPLEXITY_TOLERANCE", "check_agreement"]

PERPLEXITY_TOLERANCE = 0.01
"""Largest relative difference between the perplexities of the export and of the model in memory,
where the text is long enough to tell. In float32 both compute the same to the last bit of nearly
every input. In a half type they multiply in another order: an input that lies half-way between two
codes falls the other way, and changes the rounding of every layer after it. The two then carry
the same noise, drawn anew, and the means of n tokens differ by about sqrt(2 KL / n) nats."""

_STANDARD_ERRORS = 3


def check_agreement(memory: Evaluation, exported: Evaluation, *, where: Path) -> None:
    """Compares the reloaded export with the model that was written.

    Passes where the perplexities are within ``PERPLEXITY_TOLERANCE``, or within three standard
    errors of it being chance while the export is no further from the model in memory than the
    original is.

    Args:
        memory: The quantized model in memory; without a distance to its original, noise is no
            excuse.
        exported: The reloaded export, with its distance to ``memory``.
        where: The export, for the message.

    Raises:
        VerificationError: The two are not the same model.
    """
    change = exported.perplexity / memory.perplexity - 1
    distance = exported.distances["memory"].kl
    original = memory.distances.get("original")
    brought = original.kl if original else 0.0
    chance = _STANDARD_ERRORS * math.sqrt(2 * max(distance, 0.0) / exported.num_tokens)
    is_noise = abs(exported.loss - memory.loss) <= chance and distance <= brought
    if not (abs(change) <= PERPLEXITY_TOLERANCE or is_noise):
        raise VerificationError(
            "the export, reloaded, is not the model that was in memory",
            where=where,
            found=f"perplexity {exported.perplexity:.4f} reloaded, {memory.perplexity:.4f} in "
            f"memory, KL {distance:.3g} nats where quantizing brought {brought:.3g}",
            allowed=f"a difference of {PERPLEXITY_TOLERANCE:.0%}, or {math.expm1(chance):.1%} by "
            "chance with no larger KL than quantizing brought",
            hint="the files are kept for inspection; please report this as a bug",
        )
