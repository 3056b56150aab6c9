"""``slimtron-quant run``: quantize, prove, export, reload, report."""

from __future__ import annotations

import argparse
import logging

from slimtron_common.job_arguments import add_restart
from slimtron_quant.cli.job_arguments import add_job_arguments, job_config

logger = logging.getLogger(__name__)

HELP = "quantize a model, prove it before and after, and export it"
EPILOG = """\
examples:
  slimtron-common demo-model smollm2
  slimtron-quant run --model hf:smollm2 --recipe fp8 --out smollm2-fp8 --data pydoc \\
      --calib-size 4 --calib-seq-len 512 --calib-batch-size 1
  slimtron-quant run job.yaml --set quantization.algorithm=int4_awq
  slimtron-quant run job.yaml --recipe none --kv-cache fp8
  slimtron-quant run job.yaml --bits 4.8 --block-size auto
  slimtron-quant run job.yaml --layerwise
  torchrun --nproc-per-node 3 -m slimtron_quant run job.yaml --tp 3

exit codes: 0 done, 1 failed, 2 refused, 3 done but a quality gate was missed
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_job_arguments(parser)
    add_restart(parser)


def execute(args: argparse.Namespace) -> int:
    """Runs the job and prints the comparison."""
    config = job_config(args)

    from slimtron_common.memory import peak_memory
    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_common.report import print_comparison
    from slimtron_quant.job.preflight import preflight
    from slimtron_quant.job.run import run

    plan = preflight(config, resume=args.resume, overwrite=args.overwrite)
    comparison = run(plan, resume=args.resume, overwrite=args.overwrite)
    missed = config.gate.misses(comparison.columns[0].metrics, comparison.columns[-1].metrics)
    if rank_from_environment() == 0:
        print_comparison(comparison)
        for fact in ("Quantized", "As it was", "KV cache"):
            print(f"{fact.lower():<10} {comparison.facts[fact]}")
        peak = peak_memory(plan.device) / 2**30
        print(f"{'memory':<10} {peak:.2f} GiB at most in this process; planned {plan.memory}")
        print(f"{'model':<10} {config.output}")
        print(f"{'report':<10} {config.output / 'report.html'}")
        for limit in missed:
            logger.error("quality gate missed: %s", limit)
    return 3 if missed else 0
