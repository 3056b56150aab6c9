"""Rank the shapes of a space by what they are likely to lose, and measure the most promising.

Of each part (layers, hidden, ffn, heads, experts) one probe is measured: the model with that part
alone made smaller. What a shape loses is then taken to be the sum of what its parts lose, each of
them in proportion to the importance that is cut away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from slimtron_common.models import Architecture
from slimtron_prune.scoring.scores import Scores
from slimtron_prune.search.shapes import Space, combine
from slimtron_prune.selection import select

__all__ = ["Candidate", "Measure", "SearchResult", "lost_importance", "search"]

Measure = Callable[[Architecture], float]
"""Cuts a shape and returns its mean loss on a text, in nats per token."""

_CURVE_POINTS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A shape, and how good it is."""

    shape: Architecture
    cost: int
    """What it takes of the budget."""

    predicted: float
    """Mean loss to expect, in nats per token."""

    loss: float | None = None
    """Mean loss that was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search found."""

    original: Candidate
    """The model itself."""

    candidates: list[Candidate]
    """Those that fit and were measured, the best first."""

    curve: list[Candidate]
    """The shape that promises most at each of several costs, from small to large."""

    @property
    def best(self) -> Candidate:
        """The shape to prune to."""
        return self.candidates[0]


def search(space: Space, scores: Scores, measure: Measure, num_candidates: int) -> SearchResult:
    """Finds the shape with the lowest loss within a budget.

    Args:
        space: The shapes.
        scores: Of the model.
        measure: Measures a shape; all processes call it alike.
        num_candidates: How many of those that fit are measured.
    """
    loss = measure(space.source)
    original = Candidate(
        shape=space.source, cost=space.cost(space.source), predicted=loss, loss=loss
    )
    rises = {part: _rises(part, space, scores, measure, loss) for part in space.choices}
    ranked = []
    for numbers in product(*(range(len(shapes)) for shapes in space.choices.values())):
        chosen = dict(zip(space.choices, numbers, strict=True))
        parts = {part: space.choices[part][number] for part, number in chosen.items()}
        shape = combine(space.source, parts)
        predicted = loss + sum(rises[part][number] for part, number in chosen.items())
        ranked.append(Candidate(shape=shape, cost=space.cost(shape), predicted=predicted))
    ranked.sort(key=lambda candidate: (candidate.predicted, candidate.cost))
    fitting = [candidate for candidate in ranked if candidate.cost <= space.budget]
    measured = [replace(c, loss=measure(c.shape)) for c in fitting[:num_candidates]]
    measured.sort(key=lambda candidate: candidate.loss or 0.0)
    return SearchResult(original=original, candidates=measured, curve=_curve(ranked, original.cost))


def lost_importance(part: str, shape: Architecture, scores: Scores) -> float:
    """Share of a part's importance that a shape cuts away, from 0 to 1."""
    selection = select(shape, scores)
    if part == "layers":
        return 1 - _share(scores.layers, scores.layers[list(selection.layers)])
    of = {
        "hidden": (scores.hidden, selection.hidden),
        "ffn": (scores.ffn, selection.ffn),
        "heads": (scores.heads, selection.heads),
    }
    if scores.architecture.moe:
        of["experts"] = (scores.experts, selection.experts)
    values, kept = of[part]
    return 0.0 if kept is None else 1 - _share(values, values.gather(-1, kept))


def _share(values: Tensor, kept: Tensor) -> float:
    return float(kept.sum() / values.sum())


def _rises(
    part: str, space: Space, scores: Scores, measure: Measure, original: float
) -> list[float]:
    """Loss that each size of a part adds, by one measurement in their middle."""
    shapes = space.choices[part]
    lost = [lost_importance(part, shape, scores) for shape in shapes]
    probe = len(shapes) // 2
    rise = max(measure(shapes[probe]) - original, 0.0)
    return [rise * share / lost[probe] if lost[probe] else 0.0 for share in lost]


def _curve(ranked: list[Candidate], largest: int) -> list[Candidate]:
    """The best prediction below each of equally spaced costs."""
    smallest = min(candidate.cost for candidate in ranked)
    found: list[Candidate] = []
    for point in range(_CURVE_POINTS + 1):
        limit = smallest + (largest - smallest) * point // _CURVE_POINTS
        best = next(candidate for candidate in ranked if candidate.cost <= limit)
        if not found or found[-1] != best:
            found.append(best)
    return found
