"""A plan as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from slimtron_common.checkpoint.kinds import KIND_OF_FORMAT
from slimtron_common.data import TokenDataset
from slimtron_common.memory import required_memory
from slimtron_common.models import Architecture
from slimtron_common.models.counting import count_parameters
from slimtron_common.speed import measured_flops, show_duration
from slimtron_prune.job.preflight import PrunePlan

__all__ = ["print_plan"]


def print_plan(plan: PrunePlan, console: Console | None = None) -> None:
    """Prints what a job will do and what it will cost.

    The time is that of the forward passes at the speed of a matrix product measured here and
    now; loading, cutting and writing come on top.
    """
    model, config = plan.model, plan.config
    parallel = config.parallel
    seconds = plan.flops / (measured_flops(model.device, model.dtype) * model.world_size)
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.memory.items())
    rows = [
        ("model", f"{config.model}, {_parameters(model.architecture)}"),
        ("to", _goal(plan)),
        ("output", f"{KIND_OF_FORMAT[config.export.export_format]}:{config.export.path}"),
        ("evaluation text", _sequences(plan.evaluation)),
        ("scoring text", "none needed" if plan.scoring is None else _sequences(plan.scoring)),
        ("computed in", f"{model.dtype} on {model.device}".replace("torch.", "")),
        (
            "processes",
            f"{model.world_size}: tensor {parallel.tensor_parallel_size} x pipeline "
            f"{parallel.pipeline_parallel_size} x data {model.data_parallel_size}",
        ),
        ("memory per process", f"{_size(required_memory(plan.memory.values()))}: {parts}"),
        ("disk", f"{_size(plan.disk)} while it runs"),
        ("forward passes", f"about {show_duration(seconds)} at this machine's matrix speed"),
    ]
    table = Table("", "", title="This job can run", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    (console or Console()).print(table)


def _goal(plan: PrunePlan) -> str:
    if plan.target is not None:
        # Which layers of a hybrid go, which are not alike, only scores will tell.
        about = plan.target.hybrid and plan.config.pruning.target_num_layers
        return f"about {_parameters(plan.target)}" if about else _parameters(plan.target)
    assert plan.space is not None, "there is a target or a search"
    space = plan.space
    sizes = ", ".join(f"{len(shapes)} {part}" for part, shapes in space.choices.items())
    return f"the best shape below {space.budget:,} {space.unit}, among {sizes}"


def _parameters(architecture: Architecture) -> str:
    return f"{sum(count_parameters(architecture).values()):,} parameters"


def _sequences(dataset: TokenDataset) -> str:
    return f"{dataset.num_sequences} sequences of {dataset.seq_length} tokens"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
