"""Choose one format for each layer: the least harm for the bits there are.

The choice is a multiple-choice knapsack, solved by its linear relaxation (Sinha and Zoltners 1979,
https://doi.org/10.1287/opre.27.3.503): upgrades are bought in the order of harm avoided per bit.
Only the last one bought may be less than optimal.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

__all__ = ["choose_formats"]

Options = Mapping[str, tuple[float, float]]
"""Format -> bits that the layer would take in it, and the harm that it would do."""


def choose_formats(layers: Mapping[str, Options], budget: float) -> dict[str, str]:
    """Chooses a format for each layer.

    Args:
        layers: What each layer could be, in bits of the whole layer.
        budget: Bits for all layers together, no less than the smallest formats take.

    Returns:
        Layer -> format. The same for the same input, on every process.
    """
    ladders = {name: _ladder(options) for name, options in layers.items()}
    chosen = {name: ladder[0] for name, ladder in ladders.items()}
    left = budget - sum(layers[name][format_name][0] for name, format_name in chosen.items())
    assert left >= 0, "the budget was checked"
    steps = [
        (_saving(layers[name], below, above), name, below, above)
        for name, ladder in ladders.items()
        for below, above in pairwise(ladder)
    ]
    # Steps of one layer come in order: a ladder's savings per bit fall.
    for _, name, below, above in sorted(steps, key=lambda step: (-step[0], step[1])):
        bits = layers[name][above][0] - layers[name][below][0]
        # A layer whose step did not fit stays where it is.
        if chosen[name] == below and bits <= left:
            chosen[name] = above
            left -= bits
    return chosen


def _ladder(options: Options) -> list[str]:
    """The formats worth choosing, from small to large: the lower convex hull."""
    ladder: list[str] = []
    for name in sorted(options, key=lambda name: options[name]):
        if ladder and options[name][1] >= options[ladder[-1]][1]:
            continue
        while len(ladder) > 1 and _saving(options, ladder[-2], ladder[-1]) <= _saving(
            options, ladder[-1], name
        ):
            ladder.pop()
        ladder.append(name)
    return ladder


def _saving(options: Options, below: str, above: str) -> float:
    """Harm avoided per bit by taking ``above`` instead of ``below``."""
    (bits, harm), (more_bits, less_harm) = options[below], options[above]
    return (harm - less_harm) / (more_bits - bits)
