"""What a mixed-precision job's report says of its choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from slimtron_common.report import Number, Plot, Table
from slimtron_quant.job.mixed import Assignment, Candidates
from slimtron_quant.mixed.config import UNQUANTIZED
from slimtron_quant.mixed.groups import FormatGroup
from slimtron_quant.summary import LayerSummary

__all__ = ["choice_facts", "choice_table", "sensitivity_plots", "with_reasons"]

_KINDS = {
    "self_attention.linear_qkv": "QKV",
    "self_attention.linear_proj": "attention output",
    "mlp.linear_fc1": "gate and up",
    "mlp.linear_fc2": "down",
    "mlp.experts": "experts",
}


def choice_facts(assignment: Assignment, candidates: Candidates) -> dict[str, str]:
    """Returns the budget, what was made of it, and what it was expected to cost."""
    storage, chosen = candidates.storage, assignment.chosen
    harm = sum(assignment.sensitivity.harm(*choice) for choice in chosen.items())
    text = assignment.sensitivity.text
    return {
        "Budget": f"{candidates.config.budget}; the choice takes {storage.bits(chosen):.3f} bits "
        f"for each weight of the linear layers, {storage.num_bytes(chosen) / 1e6:.2f} MB in all",
        "Expected KL divergence": f"{harm:.4f} nats, the sum over the groups as measured on "
        f"{text['num_tokens']} tokens of the calibration's text",
    }


def with_reasons(
    layers: Iterable[LayerSummary], assignment: Assignment, candidates: Candidates
) -> list[LayerSummary]:
    """Returns the summaries of layers, with the reason of those that were chosen to stay."""
    kept = {
        member
        for group in candidates.storage.groups
        if assignment.chosen[group.name] == UNQUANTIZED
        for member in group.members
    }
    return [
        replace(layer, reason="chosen to stay") if layer.name in kept else layer for layer in layers
    ]


def choice_table(assignment: Assignment, candidates: Candidates) -> Table:
    """Returns each group with its choice and its sensitivities."""
    measured = assignment.sensitivity.candidates
    return Table(
        "Choice of formats",
        ("group", "chosen", *(f"KL in {name}" for name in measured)),
        tuple(
            (
                group.name,
                assignment.chosen[group.name],
                *(measured[name].divergence.get(group.name) for name in measured),
            )
            for group in candidates.storage.groups
        ),
    )


def sensitivity_plots(assignment: Assignment, candidates: Candidates) -> list[Plot]:
    """Returns a diagram of the layers for every candidate."""
    groups = candidates.storage.groups
    layers = sorted({group.layer for group in groups})
    return [
        Plot(
            f"Sensitivity to {name}",
            "line",
            tuple(layers),
            _series(groups, layers, entry.divergence),
            x_label="layer",
            y_label="KL divergence, nats a token",
            log_y=True,
        )
        for name, entry in assignment.sensitivity.candidates.items()
    ]


def _series(
    groups: Sequence[FormatGroup], layers: Sequence[int], divergence: Mapping[str, float]
) -> dict[str, tuple[Number, ...]]:
    found: dict[str, dict[int, Number]] = {}
    for group in groups:
        if group.name in divergence:
            # A logarithmic axis has no place for zero, which an idle expert may have.
            found.setdefault(group.kind, {})[group.layer] = divergence[group.name] or None
    return {
        _KINDS.get(kind, kind): tuple(values.get(layer) for layer in layers)
        for kind, values in found.items()
    }
