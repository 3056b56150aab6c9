"""A plan as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from slimtron_common.checkpoint.kinds import KIND_OF_FORMAT
from slimtron_common.memory import required_memory
from slimtron_distill.job.preflight import Plan

__all__ = ["print_plan"]


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints what a job will do and what it will take."""
    config, training, parallel = plan.config, plan.config.training, plan.config.parallel
    tokens = training.steps * training.global_batch_size * training.seq_length
    epochs = training.steps * training.global_batch_size / plan.training.num_sequences
    rows = [
        ("student", f"{config.student}, {plan.student.num_parameters:,} parameters"),
        ("teacher", _teacher(plan)),
        ("output", f"{KIND_OF_FORMAT[config.export.export_format]}:{config.output}"),
        (
            "training",
            f"{training.steps} steps of {training.global_batch_size} sequences of "
            f"{training.seq_length} tokens: {tokens:,} tokens, {epochs:.2f} times the text",
        ),
        (
            "micro-batches",
            f"{training.num_micro_batches(plan.data_parallel_size)} of "
            f"{training.micro_batch_size} sequence(s) in a step of each copy",
        ),
        (
            "held-out text",
            f"{plan.held_out.num_sequences} sequences of {plan.held_out.seq_length} tokens",
        ),
        ("computed in", f"{plan.dtype} on {plan.device}".replace("torch.", "")),
        (
            "processes",
            f"{plan.world_size}: tensor {parallel.tensor_parallel_size} x pipeline "
            f"{parallel.pipeline_parallel_size} x data {plan.data_parallel_size}",
        ),
        *((f"memory: {name}", _size(size)) for name, size in plan.memory.items()),
        ("memory per process", f"{_size(required_memory(plan.memory.values()))} in all"),
        ("disk", f"{_size(plan.disk)} while it runs"),
    ]
    table = Table("", "", title="This job can run", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    (console or Console()).print(table)


def _teacher(plan: Plan) -> str:
    parameters = f"{plan.teacher_facts['parameters']:,} parameters"
    cache = plan.config.teacher_cache
    if cache.path is None:
        return f"{plan.config.teacher}, {parameters}"
    kept = f"{cache.top_k} logits of each token in {cache.path}"
    return f"{plan.teacher_facts['name']}, {parameters}, {kept}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
