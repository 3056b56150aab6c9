"""The comparison of student and teacher at the end of a job."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from slimtron_common.data import TokenDataset
from slimtron_common.evaluation import Evaluation
from slimtron_common.manifest import environment_versions
from slimtron_common.report import Column, Comparison, Number, Plot
from slimtron_distill.job.preflight import Plan

__all__ = ["compare"]

_NOT_PLOTTED = {"step", "tokens_per_second", "updated", "skipped"}
_MAX_POINTS = 500


def compare(
    plan: Plan,
    *,
    start: Evaluation,
    student: Evaluation,
    teacher: Evaluation,
    records: Sequence[dict[str, Any]],
) -> Comparison:
    """Puts the teacher, and the student before and after, side by side.

    Args:
        plan: The job.
        start: The student before the training.
        student: The student as it was written, reloaded.
        teacher: The teacher.
        records: The training's log.
    """
    config, training = plan.config, plan.config.training
    tokens = training.steps * training.global_batch_size * training.seq_length
    optimizer = config.optimizer
    before, after = _column("start", start), _column("distilled", student)
    for column in (before, after):
        column.metrics.update(num_parameters=plan.student.num_parameters)
    reference = _column("teacher", teacher)
    reference.metrics.update(num_parameters=plan.teacher_facts["parameters"], kl=0.0, agreement=1.0)
    return Comparison(
        title=f"{plan.student.path.name} distilled from {plan.teacher_facts['name']}",
        columns=(reference, before, after),
        plots=tuple(_plots(records)),
        facts={
            "Student": config.student,
            "Teacher": config.teacher or f"{config.teacher_cache.path} (its logits)",
            "Perplexity recovered": _recovered(start, student, teacher),
            "Trained on": f"{training.steps} steps of {training.global_batch_size} sequences of "
            f"{training.seq_length} tokens: {tokens:,} tokens of "
            f"{_text(config.data.source, plan.training)}",
            "Optimizer": f"AdamW, learning rate {optimizer.lr} to {optimizer.min_lr} "
            f"({optimizer.decay}), {optimizer.warmup_steps} steps of warm-up",
            "Updates left out": str(
                next(r["skipped"] for r in reversed(records) if "skipped" in r)
            ),
            "Evaluated on": "held out: "
            + _text(config.evaluation.source or config.data.source, plan.held_out),
            "Speed": _speed(records),
            "Computed in": f"{plan.dtype} on {plan.device}".replace("torch.", ""),
            "Layout": f"tensor {config.parallel.tensor_parallel_size}, pipeline "
            f"{config.parallel.pipeline_parallel_size}, data {plan.data_parallel_size}, "
            f"{plan.world_size} process(es)",
            "Seed": str(config.seed),
            "Versions": ", ".join(f"{k} {v}" for k, v in environment_versions().items()),
        },
    )


def _column(name: str, evaluation: Evaluation) -> Column:
    metrics: dict[str, Number] = {
        "perplexity": evaluation.perplexity,
        "loss": evaluation.loss,
        "num_tokens": evaluation.num_tokens,
    }
    if "teacher" in evaluation.distances:
        distance = evaluation.distances["teacher"]
        metrics.update(kl=distance.kl, agreement=distance.agreement)
    return Column(name, metrics)


def _recovered(start: Evaluation, student: Evaluation, teacher: Evaluation) -> str:
    lost = start.perplexity - teacher.perplexity
    if lost <= 0:
        return "nothing was lost: the student began at or below the teacher's perplexity"
    return f"{(start.perplexity - student.perplexity) / lost:.1%} of what the student had lost"


def _text(source: str, dataset: TokenDataset) -> str:
    return (
        f"{source}: {dataset.num_sequences} sequences of {dataset.seq_length} tokens "
        f"(SHA-256 {dataset.fingerprint[:12]})"
    )


def _speed(records: Sequence[dict[str, Any]]) -> str:
    speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    return f"{statistics.median(speeds):,.0f} tokens/s (median of the steps)"


def _plots(records: Sequence[dict[str, Any]]) -> list[Plot]:
    steps = [r for r in records if "lr" in r]
    measured = [r for r in records if "validation_kl" in r]
    # A page of a few hundred points shows as much as one of all.
    steps = steps[:: -(-len(steps) // _MAX_POINTS)]
    losses = [name for name in steps[0] if name not in _NOT_PLOTTED | {"lr", "grad_norm"}]
    plots = [
        _plot("Training losses", steps, losses, "nats per token"),
        _plot("Norm of the gradient", steps, ["grad_norm"], "before clipping"),
        _plot("Learning rate", steps, ["lr"], ""),
    ]
    if measured:
        plots.insert(
            1, _plot("Held-out perplexity", measured, ["validation_perplexity"], "perplexity")
        )
        plots.insert(
            2, _plot("Held-out KL from the teacher", measured, ["validation_kl"], "nats per token")
        )
    return plots


def _plot(title: str, records: Sequence[dict[str, Any]], names: list[str], unit: str) -> Plot:
    return Plot(
        title,
        "line",
        tuple(r["step"] for r in records),
        {name: tuple(r.get(name) for r in records) for name in names},
        x_label="step",
        y_label=unit,
    )
