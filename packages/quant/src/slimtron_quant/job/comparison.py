"""The before/after comparison of a job."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from slimtron_common.evaluation import Evaluation
from slimtron_common.manifest import environment_versions
from slimtron_common.report import Column, Comparison, Metric, Number, Plot, Table
from slimtron_quant.calibration.experts import ExpertTokens
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.export.kinds import Export
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.job.choice import choice_facts, choice_table, sensitivity_plots, with_reasons
from slimtron_quant.job.coverage import coverage
from slimtron_quant.job.mixed import Assignment
from slimtron_quant.job.preflight import Plan
from slimtron_quant.summary import LayerSummary

__all__ = ["compare"]

_KINDS = {
    "self_attention.linear_qkv": "QKV",
    "self_attention.linear_proj": "attention output",
    "mlp.linear_fc1": "gate and up",
    "mlp.linear_fc2": "down",
}

_METRICS = (
    Metric("bits_per_quantized_weight", "Bits per quantized weight", better="lower"),
    Metric("kl_memory", "KL to in-memory", unit="nats", better="lower"),
)


def compare(
    plan: Plan,
    evaluations: Mapping[str, Evaluation],
    *,
    layers: Sequence[LayerSummary],
    mended: Sequence[Mapping[str, Any]],
    experts: Sequence[ExpertTokens],
    exported: Export,
    assignment: Assignment | None = None,
) -> Comparison:
    """Puts original, quantized and reloaded model side by side.

    Args:
        plan: The job.
        evaluations: Of the stages ``original``, ``quantized`` and ``exported``.
        layers: What became of each linear layer.
        mended: Scales that were missing or too small.
        experts: Calibration tokens of a mixture's experts.
        exported: The written files.
        assignment: The choice of a mixed-precision job.
    """
    checkpoint, config = plan.checkpoint, plan.config
    mixed = plan.mixed.candidates if plan.mixed else None
    if assignment is not None and mixed is not None:
        layers = with_reasons(layers, assignment, mixed)
    covered = coverage(checkpoint.architecture, layers, exported)
    original = _column("original", evaluations["original"])
    original.metrics.update(
        weight_bytes=checkpoint.weight_bytes,
        bits_per_weight=checkpoint.weight_bytes * 8 / checkpoint.num_parameters,
        kl=0.0,
        agreement=1.0,
    )
    memory = _column("in memory", evaluations["quantized"])
    reloaded = _column("exported", evaluations["exported"])
    reloaded.metrics.update(
        weight_bytes=exported.weight_bytes,
        bits_per_weight=exported.bits_per_weight,
        bits_per_quantized_weight=covered.bits_per_quantized_weight,
        kl_memory=evaluations["exported"].distances["memory"].kl,
    )
    facts, plots = {}, _plots(layers)
    tables = [
        covered.table(),
        *_kv_scales(exported),
        *_mended(mended),
        *_experts(experts, config.quantization.min_expert_tokens),
    ]
    if assignment is not None and mixed is not None:
        facts = choice_facts(assignment, mixed)
        plots = [*sensitivity_plots(assignment, mixed), *plots]
        tables.insert(1, choice_table(assignment, mixed))
    verdict = config.gate.verdict(original.metrics, reloaded.metrics)
    return Comparison(
        title=f"{checkpoint.path.name} quantized to {plan.goal}",
        columns=(original, memory, reloaded),
        plots=tuple(plots),
        tables=tuple(tables),
        facts={
            "Model": config.model,
            "Parameters": f"{checkpoint.num_parameters:,}",
            "Recipe": plan.method,
            **facts,
            **covered.facts(),
            "KV cache": plan.kv_cache,
            "Evaluated on": _text(
                config.evaluation.source or config.quantization.calibration_source,
                plan.evaluation,
            ),
            "Calibrated on": "no text needed"
            if plan.calibration is None
            else _text(config.quantization.calibration_source, plan.calibration),
            **_routing(experts, config.quantization),
            **({"Quality gate": verdict} if verdict else {}),
            "Computed in": f"{plan.dtype} on {plan.device}".replace("torch.", ""),
            "Memory": plan.memory,
            "Layout": config.parallel.describe(plan.world_size),
            "Seed": str(config.seed),
            "Versions": ", ".join(f"{k} {v}" for k, v in environment_versions().items()),
        },
        metrics=_METRICS,
    )


def _column(name: str, evaluation: Evaluation) -> Column:
    metrics: dict[str, Number] = {
        "perplexity": evaluation.perplexity,
        "num_tokens": evaluation.num_tokens,
    }
    if "original" in evaluation.distances:
        distance = evaluation.distances["original"]
        metrics.update(kl=distance.kl, agreement=distance.agreement)
    return Column(name, metrics)


def _text(source: str, dataset: Any) -> str:
    return (
        f"{source}: {dataset.num_sequences} sequences of {dataset.seq_length} tokens "
        f"(SHA-256 {dataset.fingerprint[:12]})"
    )


def _plots(layers: Sequence[LayerSummary]) -> list[Plot]:
    numbers = sorted({_layer_number(layer.name) for layer in layers})

    def series(attribute: str) -> dict[str, tuple[Number, ...]]:
        found: dict[str, tuple[Number, ...]] = {}
        for suffix, label in _KINDS.items():
            values = {
                _layer_number(layer.name): getattr(layer, attribute)
                for layer in layers
                if layer.name.endswith(suffix)
            }
            if any(value is not None for value in values.values()):
                found[label] = tuple(values.get(number) for number in numbers)
        return found

    plots = []
    if noise := series("sqnr_db"):
        plots.append(
            Plot(
                "Signal to quantization noise of the weights",
                "line",
                tuple(numbers),
                noise,
                x_label="layer",
                y_label="dB, higher is better",
            )
        )
    if amax := series("input_amax"):
        plots.append(
            Plot(
                "Largest calibrated activation",
                "line",
                tuple(numbers),
                amax,
                x_label="layer",
                y_label="absolute value",
                log_y=True,
            )
        )
    return plots


def _kv_scales(exported: Export) -> list[Table]:
    if not isinstance(exported, ExportedModel) or exported.kv_cache is None:
        return []
    return [
        Table(
            "Scales of the KV cache",
            ("layer", "keys", "values"),
            tuple(
                (layer, *map(float, exported.kv_scales(layer)))
                for layer in range(exported.architecture.num_layers)
            ),
        )
    ]


def _mended(mended: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not mended:
        return []
    return [
        Table(
            "Scales that were mended",
            ("quantizer", "scales", "reason"),
            tuple((m["quantizer"], m["elements"], m["reason"]) for m in mended),
        )
    ]


def _experts(experts: Sequence[ExpertTokens], threshold: int) -> list[Table]:
    if not experts:
        return []
    return [
        Table(
            "Calibration tokens of each expert",
            ("layer", "fewest", "median", "most", f"experts below {threshold}", "which"),
            tuple(
                (
                    layer.layer,
                    min(layer.tokens),
                    statistics.median(layer.tokens),
                    max(layer.tokens),
                    len(short := layer.below(threshold)),
                    ", ".join(map(str, short)),
                )
                for layer in experts
            ),
        )
    ]


def _routing(experts: Sequence[ExpertTokens], config: QuantizationConfig) -> dict[str, str]:
    """How well the text covered the experts of a mixture, in a line."""
    if not experts:
        return {}
    total = sum(len(layer.tokens) for layer in experts)
    short = sum(len(layer.below(config.min_expert_tokens)) for layer in experts)
    routed = f"{short} of {total} were sent fewer than {config.min_expert_tokens} tokens"
    seen = (
        "every token, whatever the routers chose" if config.calibrate_all_experts else "as routed"
    )
    return {"Experts calibrated on": f"{seen}; {routed}"}


def _layer_number(name: str) -> int:
    return int(name.split(".")[2])
