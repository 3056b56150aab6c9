"""A plan as a person reads it."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from slimtron_common.speed import measured_flops, show_duration
from slimtron_quant.job.preflight import Plan

__all__ = ["print_plan"]


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints what a job will do and what it will cost.

    The time is that of the forward passes at the speed of a matrix product measured here and
    now; loading, scales and writing come on top.
    """
    parallel, estimate = plan.config.parallel, plan.estimate
    seconds = estimate.flops / (measured_flops(plan.device, plan.dtype) * plan.world_size)
    experts, context = "", ""
    if parallel.context_parallel_size > 1:
        context = f"context {parallel.context_parallel_size} x "
    if parallel.expert_parallel_size > 1:
        experts = f", experts shared out to {parallel.expert_parallel_size}"
    rows = [
        ("model", f"{plan.config.model}, {plan.checkpoint.num_parameters:,} parameters"),
        ("recipe", plan.method),
        *_choice(plan),
        ("KV cache", plan.kv_cache),
        ("output", f"{plan.config.export.export_format}:{plan.config.output}"),
        ("evaluation text", _sequences(plan.evaluation)),
        (
            "calibration text",
            "none needed" if plan.calibration is None else _sequences(plan.calibration),
        ),
        ("computed in", f"{plan.dtype} on {plan.device}".replace("torch.", "")),
        (
            "processes",
            f"{plan.world_size}: tensor {parallel.tensor_parallel_size} x pipeline "
            f"{parallel.pipeline_parallel_size} x {context}data "
            f"{plan.world_size // parallel.model_parallel_size}" + experts,
        ),
        (
            "memory per process" + (", one layer at a time" if plan.config.layerwise else ""),
            f"{_size(estimate.memory)}: weights {_size(estimate.weights)}, activations "
            f"{_size(estimate.activations)}, statistics {_size(estimate.statistics)}",
        ),
        ("disk", f"{_size(estimate.disk)} while it runs"),
        ("forward passes", f"about {show_duration(seconds)} at this machine's matrix speed"),
    ]
    table = Table("", "", title="This job can run", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    (console or Console()).print(table)


def _choice(plan: Plan) -> list[tuple[str, str]]:
    mixed = plan.mixed
    if mixed is None:
        return [("linear layers", plan.scheme.describe())]
    storage, budget = mixed.candidates.storage, plan.config.mixed
    allowed = ("budget", f"{budget.budget}; {storage.described_range(budget)} are possible")
    groups = f"{len(storage.groups)} groups of layers"
    if mixed.saved is None:
        measured = f"{mixed.candidates.num_measurements} on {mixed.text.tokens.size} tokens"
        return [allowed, ("measurements", f"{measured}, for {groups}")]
    counts = Counter(mixed.assign(mixed.saved).chosen.values())
    chosen = ", ".join(f"{count} to {name}" for name, count in counts.items())
    return [allowed, ("choice", f"{groups}: {chosen}")]


def _sequences(dataset: object) -> str:
    return f"{dataset.num_sequences} sequences of {dataset.seq_length} tokens"  # type: ignore[attr-defined]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
