"""Perplexity of a mixed-precision choice, beside uniform formats and random choices.

    python benchmarks/mixed_precision.py MODEL_DIR [--bits 4.8] [--candidates int4_awq,fp8,none]

The choice comes from the whole job (sensitivity, export, reload). The others are quantized by the
same code on the same calibration text and measured on the same held-out tokens. A random choice
starts from the smallest formats, too, and buys larger ones in random order until nothing fits.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from slimtron_common.config import build_config
from slimtron_common.evaluation import evaluate
from slimtron_common.manifest import environment_versions
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import read_report
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.export.folding import fold_input_factors
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.mixed import Candidates, MixedPlan
from slimtron_quant.job.preflight import Plan, preflight
from slimtron_quant.job.run import run
from slimtron_quant.mixed.assignment import quantization_of
from slimtron_quant.mixed.sensitivity import SENSITIVITY_NAME, Sensitivity
from slimtron_quant.quantizer import Quantizer, calibration_loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=float, default=4.8)
    parser.add_argument("--candidates", default="int4_awq,fp8,none")
    parser.add_argument("--uniform", default="int4,int4_awq", help="recipes to compare with")
    parser.add_argument("--random", type=int, default=5, help="random choices")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--calib-size", type=int, default=4)
    parser.add_argument("--sensitivity-tokens", type=int, default=512)
    parser.add_argument("--sensitivity", type=Path, help="of an earlier run")
    parser.add_argument("--out", type=Path, help="keep the mixed model here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder) / "out"
        plan = _plan(args, out)
        mixed = plan.mixed
        assert mixed is not None
        start = time.perf_counter()
        original, memory, exported = (column.metrics for column in run(plan).columns)
        seconds = time.perf_counter() - start
        print(f"the mixed-precision job took {seconds:.0f} s", flush=True)
        print(*read_report(out).facts.items(), sep="\n", flush=True)
        sensitivity = Sensitivity.read(out / SENSITIVITY_NAME)
    candidates = mixed.candidates
    rows = [("original", 16.0, original["perplexity"], 0.0, 0.0)]
    chosen = mixed.assign(sensitivity).chosen
    rows.append(_row("mixed", candidates, sensitivity, chosen, memory["perplexity"], memory["kl"]))
    rows.append(
        _row("mixed, exported", candidates, sensitivity, chosen, exported["perplexity"],
             exported["kl"])
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder)
        _measure(plan, None, record)
        for name in args.uniform.split(","):
            found = _measure(plan, candidates.candidate(name), record)
            uniform = dict.fromkeys(candidates.storage.options, name)
            if name in candidates.schemes:
                rows.append(_row(f"uniform {name}", candidates, sensitivity, uniform, *found))
            else:
                rows.append((f"uniform {name}", None, *found, None))
            print(rows[-1], flush=True)
        draws = []
        for seed in range(args.random):
            choice = _random_choice(mixed, seed)
            quantization = quantization_of(choice, candidates.sources, candidates.quantization)
            found = _measure(plan, quantization, record)
            draws.append(_row(f"random {seed}", candidates, sensitivity, choice, *found))
            print(draws[-1], Counter(choice.values()), flush=True)
    rows += draws
    for i, title in ((2, "perplexity"), (3, "KL")):
        print(f"median {title} of the random choices: {statistics.median(d[i] for d in draws):.4f}")
    _print(rows, plan)


def _row(
    name: str,
    candidates: Candidates,
    sensitivity: Sensitivity,
    chosen: Mapping[str, str],
    perplexity: float,
    kl: float,
) -> tuple[str, float, float, float, float]:
    expected = sum(sensitivity.harm(*choice) for choice in chosen.items())
    return name, candidates.storage.bits(chosen), perplexity, kl, expected


def _plan(args: argparse.Namespace, out: Path) -> Plan:
    return preflight(
        build_config(
            QuantJobConfig,
            flags={
                "model": f"hf:{args.model}",
                "export.path": str(out),
                "device": args.device,
                "mixed.bits": args.bits,
                "mixed.candidates": args.candidates.split(","),
                "mixed.sensitivity": args.sensitivity and str(args.sensitivity),
                "mixed.sensitivity_tokens": args.sensitivity_tokens,
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


def _measure(
    plan: Plan, quantization: QuantizationConfig | None, record: Path
) -> tuple[float, float]:
    """Perplexity, and divergence from the original, which None records."""
    architecture = plan.checkpoint.architecture
    assert plan.calibration is not None
    with initialize_parallel(device=plan.device) as context:
        model = build_model(architecture, context, dtype=plan.dtype)
        plan.checkpoint.load(model, context)
        if quantization is not None:
            loop = calibration_loop(plan.calibration.batches(1), context)
            Quantizer(quantization).quantize(model, loop)
            # As the job does, whose measurement in memory this is compared with.
            dtype = getattr(torch, plan.config.export.torch_dtype)
            fold_input_factors(model, architecture, dtype=dtype)
        found = evaluate(
            model,
            plan.evaluation.batches(1),
            context,
            vocab_size=architecture.vocab_size,
            references={} if quantization is None else {"original": record},
            record=record if quantization is None else None,
        )
    kl = found.distances["original"].kl if quantization is not None else 0.0
    return found.perplexity, kl


def _random_choice(mixed: MixedPlan, seed: int) -> dict[str, str]:
    config, storage = mixed.candidates.config, mixed.candidates.storage
    costs = {
        group: {name: storage.cost(group, name, config) for name in options}
        for group, options in storage.options.items()
    }
    chosen = {group: min(options, key=options.__getitem__) for group, options in costs.items()}
    left = storage.available(config) - sum(costs[g][name] for g, name in chosen.items())
    upgrades = [(group, name) for group, options in costs.items() for name in options]
    random.Random(seed).shuffle(upgrades)
    for group, name in upgrades:
        more = costs[group][name] - costs[group][chosen[group]]
        if 0 < more <= left:
            chosen[group] = name
            left -= more
    return chosen


def _print(rows: list[tuple[str, float | None, float, float, float | None]], plan: Plan) -> None:
    table = Table(
        title=f"{plan.checkpoint.path.name}, {plan.dtype} on {plan.device}, {date.today()}"
    )
    for header in ("choice", "bits/linear weight", "perplexity", "KL", "expected KL"):
        table.add_column(header, justify="right")
    for name, bits, perplexity, kl, expected in rows:
        table.add_row(
            name,
            "" if bits is None else f"{bits:.3f}",
            f"{perplexity:.3f}",
            f"{kl:.4f}",
            "" if expected is None else f"{expected:.4f}",
        )
    Console(width=100).print(table)
    print(", ".join(f"{name} {version}" for name, version in environment_versions().items()))


if __name__ == "__main__":
    main()
