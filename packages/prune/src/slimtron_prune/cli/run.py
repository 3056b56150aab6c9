"""``slimtron-prune run``: score, cut, reload, prove, report."""

from __future__ import annotations

import argparse
import logging

from slimtron_common.job_arguments import add_restart
from slimtron_prune.cli.job_arguments import (
    add_prune_arguments,
    prune_config,
)

logger = logging.getLogger(__name__)

HELP = "prune a model, prove it before and after, and write it"
EPILOG = """\
examples:
  slimtron-common demo-model smollm2
  slimtron-prune run --model hf:smollm2 --out smaller --data pydoc --score-tokens 16384 \\
      --ffn-hidden-size 1024 --num-layers 26
  slimtron-prune run --model hf:smollm2 --out shallower --data pydoc --drop-layers 26,27
  slimtron-prune run --model hf:smollm2 --out light --data pydoc --target-ratio 0.8
  torchrun --nproc-per-node 3 -m slimtron_prune run job.yaml --tp 3

exit codes: 0 done, 1 failed, 2 refused, 3 done but a quality gate was missed
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_prune_arguments(parser)
    add_restart(parser)


def execute(args: argparse.Namespace) -> int:
    """Runs the job and prints the comparison."""
    config = prune_config(args)

    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_common.report import print_comparison
    from slimtron_prune.job.preflight import preflight
    from slimtron_prune.job.run import run

    plan = preflight(config, resume=args.resume, overwrite=args.overwrite)
    comparison = run(plan, resume=args.resume, overwrite=args.overwrite)
    missed = config.gate.misses(comparison.columns[0].metrics, comparison.columns[-1].metrics)
    if rank_from_environment() == 0:
        print_comparison(comparison)
        print(f"{'model':<10} {config.export.path}")
        print(f"{'report':<10} {config.export.path / 'report.html'}")
        for limit in missed:
            logger.error("quality gate missed: %s", limit)
    return 3 if missed else 0
