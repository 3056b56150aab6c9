"""Perplexity and calibration time of every recipe, beside ModelOpt's own call.

    python benchmarks/quantization.py MODEL_DIR [--recipes fp8,int8] [--device cpu]

Slimtron runs its whole job (Megatron-Core, export, reload). The peer is ModelOpt's
``mtq.quantize`` with the same config on the same Megatron-Core model, calibrated on the same
tokens and measured on the same held-out tokens.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slimtron_common.config import build_config
from slimtron_common.errors import SlimtronError
from slimtron_common.evaluation import evaluate
from slimtron_common.integrations.modelopt import to_modelopt
from slimtron_common.manifest import environment_versions
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.preflight import Plan, preflight
from slimtron_quant.job.run import run
from slimtron_quant.quantizer import Quantizer, calibration_loop
from slimtron_quant.recipes import RECIPES, quantization_recipe


@dataclass
class Row:
    recipe: str
    original: float
    memory: float
    exported: float
    bits: float
    seconds: float
    peer: float
    peer_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--calib-size", type=int, default=4)
    args = parser.parse_args()
    rows = []
    for recipe in args.recipes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            try:
                plan = _plan(args, recipe, Path(folder) / "out")
                rows.append(_measure(plan))
            except SlimtronError as error:
                print(f"{recipe}: {error}", flush=True)
            else:
                print(rows[-1], flush=True)
    _print(rows, plan)


def _plan(args: argparse.Namespace, recipe: str, out: Path) -> Plan:
    return preflight(
        build_config(
            QuantJobConfig,
            flags={
                "model": f"hf:{args.model}",
                "export.path": str(out),
                "device": args.device,
                "quantization.algorithm": recipe,
                "quantization.awq_block_size": "auto",
                "quantization.calibration_dataset": args.data,
                "quantization.calibration_dataset_size": args.calib_size,
                "quantization.calibration_seq_len": 512,
                "quantization.calibration_batch_size": 1,
                "evaluation.num_tokens": args.eval_tokens,
                "evaluation.seq_length": 512,
            },
        )
    )


def _measure(plan: Plan) -> Row:
    comparison = run(plan)
    original, memory, exported = (column.metrics for column in comparison.columns)
    peer, peer_seconds = _peer(plan)
    return Row(
        recipe=plan.recipe.name,
        original=original["perplexity"],
        memory=memory["perplexity"],
        exported=exported["perplexity"],
        bits=ExportedModel(plan.config.output).bits_per_weight,
        seconds=_seconds_to_quantize(plan),
        peer=peer,
        peer_seconds=peer_seconds,
    )


def _seconds_to_quantize(plan: Plan) -> float:
    """Inserting quantizers and calibrating, without loading, evaluating or writing."""
    with initialize_parallel(device=plan.device) as context:
        model, loop = _load(plan, context)
        quantizer = Quantizer(plan.config.quantization)
        return _timed(plan.device, lambda: quantizer.quantize(model, loop))


def _peer(plan: Plan) -> tuple[float, float]:
    import modelopt.torch.quantization as mtq

    architecture = plan.checkpoint.architecture
    config = to_modelopt(quantization_recipe(plan.config.quantization, architecture))
    with initialize_parallel(device=plan.device) as context:
        model, loop = _load(plan, context)
        seconds = _timed(plan.device, lambda: mtq.quantize(model, config, loop))
        found = evaluate(
            model, plan.evaluation.batches(1), context, vocab_size=architecture.vocab_size
        )
    return found.perplexity, seconds


def _load(plan: Plan, context: ParallelContext) -> tuple[Any, Callable[[Any], None]]:
    model = build_model(plan.checkpoint.architecture, context, dtype=plan.dtype)
    plan.checkpoint.load(model, context)
    batches = plan.calibration.batches(1) if plan.calibration else []
    return model, calibration_loop(batches, context)


def _timed(device: str, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _print(rows: list[Row], plan: Plan) -> None:
    where = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor()
    table = Table(
        title=f"{plan.checkpoint.path.name}, {plan.dtype} on {plan.device} {where}, {date.today()}"
    )
    for header in (
        *("recipe", "original", "in memory", "exported", "bits/weight", "seconds"),
        *("ModelOpt", "seconds", "ours/ModelOpt"),
    ):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.recipe,
            *(f"{x:.3f}" for x in (row.original, row.memory, row.exported, row.bits)),
            f"{row.seconds:.1f}",
            f"{row.peer:.3f}",
            f"{row.peer_seconds:.1f}",
            f"{row.memory / row.peer:.4f}",
        )
    Console(width=120).print(table)
    print(", ".join(f"{name} {version}" for name, version in environment_versions().items()))


if __name__ == "__main__":
    main()
