"""What a scoring or pruning job reports."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from torch import Tensor

from slimtron_common.data import TokenDataset
from slimtron_common.evaluation import Evaluation
from slimtron_common.manifest import environment_versions
from slimtron_common.models import Architecture
from slimtron_common.models.counting import count_parameters
from slimtron_common.report import Column, Comparison, Metric, Number, Plot, Table
from slimtron_prune.job.opening import OpenModel
from slimtron_prune.job.preflight import PrunePlan, ScorePlan
from slimtron_prune.scoring.scores import Scores
from slimtron_prune.search.rank import SearchResult
from slimtron_prune.search.shapes import kv_cache_bytes
from slimtron_prune.selection import Selection

__all__ = ["compare", "describe_scores"]

_METRICS = (
    Metric("num_parameters", "Parameters", better="lower", format="count", headline=True),
    Metric("kv_bytes", "KV cache of 1,000 tokens", better="lower", format="bytes"),
    Metric("num_layers", "Layers", format="count"),
)

_SIZES = (
    ("num_layers", "layers"),
    ("hidden_size", "hidden size"),
    ("ffn_hidden_size", "feed-forward width"),
    ("num_attention_heads", "query heads"),
    ("num_query_groups", "query groups"),
    ("head_dim", "head width"),
)

_MAMBA_SIZES = (("mamba_num_heads", "Mamba heads"), ("mamba_head_dim", "Mamba head width"))


def compare(
    plan: PrunePlan,
    selection: Selection,
    *,
    original: Evaluation,
    pruned: Evaluation,
    weight_bytes: int,
    transformers_difference: float | None,
    scores: Scores | None,
    found: SearchResult | None,
) -> Comparison:
    """Puts the original and the pruned model, reloaded from its files, side by side.

    Args:
        plan: The job.
        selection: What was kept.
        original: The original, measured.
        pruned: The pruned model, measured.
        weight_bytes: Bytes of its weights on disk.
        transformers_difference: Largest difference between transformers' logits and
            Megatron-Core's; None where they were not compared.
        scores: What decided; None where layers went by number.
        found: What a search found.
    """
    config, model = plan.config, plan.model
    before = _column("original", selection.source, original, model.checkpoint.weight_bytes)
    before.metrics.update(kl=0.0, agreement=1.0)
    after = _column("pruned", selection.target, pruned, weight_bytes)
    dropped = [n + 1 for n in range(selection.source.num_layers) if n not in selection.layers]
    facts = {
        "Layers dropped": ", ".join(map(str, dropped)) + " (counted from 1)" if dropped else "none",
        "Evaluated on": _text(config.text, plan.evaluation),
        "Chosen by": _chosen_by(plan),
        "Compared with transformers": "no"
        if transformers_difference is None
        else f"logits differ by {transformers_difference:.1g} at most",
    }
    before_pattern, after_pattern = (
        a.hybrid and a.hybrid.pattern for a in (selection.source, selection.target)
    )
    if before_pattern and after_pattern:
        facts["Kinds of layers"] = f"{before_pattern} before, {after_pattern} now"
    if found is not None and plan.space is not None:
        facts["Budget"] = f"{plan.space.budget:,} {plan.space.unit}"
    if verdict := config.gate.verdict(before.metrics, after.metrics):
        facts["Quality gate"] = verdict
    return Comparison(
        title=f"{model.checkpoint.path.name} pruned",
        columns=(before, after),
        plots=(
            *([] if found is None else _search_plots(found)),
            *([] if scores is None else _score_plots(scores)),
        ),
        tables=(
            _shapes(selection.source, selection.target),
            _components(selection.source, selection.target),
            *([] if found is None else [_candidates(found)]),
        ),
        facts={"Model": config.model, **facts, **_machine(model)},
        metrics=_METRICS,
    )


def describe_scores(plan: ScorePlan, scores: Scores) -> Comparison:
    """Shows what is important in a model."""
    source = plan.model.architecture
    metrics: dict[str, Number] = {
        "num_parameters": sum(count_parameters(source).values()),
        "weight_bytes": plan.model.checkpoint.weight_bytes,
        "num_tokens": scores.num_tokens,
    }
    order = scores.layers.argsort(stable=True).tolist()
    least = ", ".join(f"{n + 1}" for n in order[: min(8, len(order))])
    return Comparison(
        title=f"{plan.model.checkpoint.path.name}: importance",
        columns=(Column("scored", metrics),),
        plots=tuple(_score_plots(scores)),
        facts={
            "Model": plan.config.model,
            "Scored on": _text(plan.config.scoring.source, plan.scoring),
            "Least important layers": f"{least} (counted from 1, the least important first)",
            **_machine(plan.model),
        },
        metrics=(*_METRICS, Metric("num_tokens", "Tokens scored on", format="count")),
    )


def _column(
    name: str, architecture: Architecture, evaluation: Evaluation, weight_bytes: int
) -> Column:
    metrics: dict[str, Number] = {
        "num_parameters": sum(count_parameters(architecture).values()),
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_cache_bytes(architecture, 1000, _itemsize(architecture)),
        "num_layers": architecture.num_layers,
        "perplexity": evaluation.perplexity,
        "num_tokens": evaluation.num_tokens,
    }
    if "original" in evaluation.distances:
        distance = evaluation.distances["original"]
        metrics.update(kl=distance.kl, agreement=distance.agreement)
    return Column(name, metrics)


def _itemsize(architecture: Architecture) -> int:
    return 4 if architecture.dtype == "float32" else 2


def _shapes(source: Architecture, target: Architecture) -> Table:
    rows: list[tuple[str, int, int]] = [
        (label, getattr(source, name), getattr(target, name)) for name, label in _SIZES
    ]
    if source.moe and target.moe:
        rows.append(("experts", source.moe.num_experts, target.moe.num_experts))
        before, after = source.moe.shared_ffn_hidden_size, target.moe.shared_ffn_hidden_size
        if before is not None and after is not None:
            rows.append(("width of the shared expert", before, after))
    if source.hybrid and target.hybrid:
        for name, label in _MAMBA_SIZES:
            rows.append((label, getattr(source.hybrid, name), getattr(target.hybrid, name)))
    return Table("Architecture", ("size", "original", "pruned"), tuple(rows))


def _components(source: Architecture, target: Architecture) -> Table:
    # A hybrid may lose all its layers of a kind.
    before, after = count_parameters(source), Counter(count_parameters(target))
    rows = [
        (name, f"{before[name]:,}", f"{after[name]:,}", f"{after[name] / before[name]:.1%}")
        for name in before
    ]
    total, left = sum(before.values()), sum(after.values())
    rows.append(("all", f"{total:,}", f"{left:,}", f"{left / total:.1%}"))
    header = ("component", "original", "pruned", "left")
    return Table("Parameters", header, tuple(rows))


def _score_plots(scores: Scores) -> list[Plot]:
    architecture = scores.architecture
    numbers = tuple(range(1, architecture.num_layers + 1))
    widths = {"hidden": (scores.hidden / scores.hidden.median()).tolist()}
    if layers := architecture.layers_with("mlp"):
        widths["feed-forward"] = _relative(scores.ffn[layers]).tolist()
    if layers := architecture.layers_with("mamba"):
        widths["Mamba"] = _relative(scores.mamba_channels[layers]).tolist()
    heads: dict[Literal["attention", "mamba"], tuple[str, Tensor]] = {
        "attention": ("query heads", scores.heads)
    }
    if architecture.hybrid:
        heads["mamba"] = ("Mamba heads", scores.mamba_heads)
    plots = [
        Plot(
            "Importance of the layers",
            "bar",
            tuple(map(str, numbers)),
            {"1 - cosine": tuple(scores.layers.tolist())},
            x_label="layer",
            y_label="change of direction",
            log_y=True,
        ),
        *(
            _head_plot(name, architecture.layers_with(part), values)
            for part, (name, values) in heads.items()
            if architecture.layers_with(part)
        ),
        Plot.histogram(
            "Importance of the channels, in shares of their median",
            widths,
            x_label="importance",
            y_label="channels",
            log_x=True,
            log_y=True,
        ),
    ]
    if architecture.moe:
        experts = scores.experts
        series = {"most important": experts.amax(-1), "least important": experts.amin(-1)}
        plots.append(
            Plot(
                "Importance of the experts",
                "line",
                numbers,
                {name: tuple(found.tolist()) for name, found in series.items()},
                x_label="layer",
                y_label="norm of the output",
            )
        )
    return plots


def _head_plot(name: str, layers: list[int], values: Tensor) -> Plot:
    values = values[layers]
    return Plot(
        f"Importance of the {name}",
        "line",
        tuple(number + 1 for number in layers),
        {
            "most important": tuple(values.amax(-1).tolist()),
            "median": tuple(values.median(-1).values.tolist()),
            "least important": tuple(values.amin(-1).tolist()),
        },
        x_label="layer",
        y_label="norm of the output",
        log_y=True,
    )


def _relative(channels: Any) -> Any:
    """Each channel in shares of its layer's (or expert's) median, flat."""
    return (channels / channels.median(-1, keepdim=True).values).flatten()


def _search_plots(found: SearchResult) -> list[Plot]:
    costs = sorted({c.cost for c in (*found.curve, *found.candidates, found.original)})
    predicted = {c.cost: c.predicted for c in found.curve}
    measured: dict[int, float | None] = {found.original.cost: found.original.loss}
    for candidate in reversed(found.candidates):
        measured[candidate.cost] = candidate.loss
    return [
        Plot(
            "Loss against cost",
            "line",
            tuple(costs),
            {
                "predicted, best shape": tuple(predicted.get(cost) for cost in costs),
                "measured": tuple(measured.get(cost) for cost in costs),
            },
            x_label="what the budget counts",
            y_label="nats per token",
        )
    ]


def _candidates(found: SearchResult) -> Table:
    rows = []
    for candidate in found.candidates:
        sizes = [getattr(candidate.shape, name) for name, _ in _SIZES[:-1]]
        rows.append((*sizes, candidate.cost, candidate.predicted, candidate.loss))
    header = (*(label for _, label in _SIZES[:-1]), "cost", "predicted loss", "measured loss")
    return Table("Candidates, the best first", header, tuple(rows))


def _chosen_by(plan: PrunePlan) -> str:
    if plan.config.pruning.drop_layers is not None:
        return "the list of layers"
    if plan.scores is not None:
        return f"the scores in {plan.config.scores}, of {plan.scores.num_tokens:,} tokens"
    return "scores on " + _text(plan.config.scoring.source, plan.scoring)


def _machine(model: OpenModel) -> dict[str, str]:
    return {
        "Computed in": f"{model.dtype} on {model.device}".replace("torch.", ""),
        "Layout": model.config.parallel.describe(model.world_size),
        "Seed": str(model.config.seed),
        "Versions": ", ".join(f"{k} {v}" for k, v in environment_versions().items()),
    }


def _text(source: str | None, dataset: TokenDataset | None) -> str:
    assert dataset is not None, "there is text"
    return (
        f"{source}: {dataset.num_sequences} sequences of {dataset.seq_length} tokens "
        f"(SHA-256 {dataset.fingerprint[:12]})"
    )
