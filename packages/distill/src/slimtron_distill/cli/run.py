"""``slimtron-distill run``: train the student, prove it before and after, export, report."""

from __future__ import annotations

import argparse

from slimtron_common.job_arguments import add_restart
from slimtron_distill.cli.job_arguments import add_job_arguments, job_config

HELP = "train a student on its teacher's logits, prove it before and after, and export it"
EPILOG = """\
examples:
  slimtron-distill run --student hf:student --teacher hf:smollm2 --out distilled --data pydoc \\
      --steps 200 --global-batch-size 4 --seq-len 256 --lr 1e-4
  slimtron-distill run job.yaml --set distillation.criterion.temperature=2
  slimtron-distill run job.yaml --resume
  torchrun --nproc-per-node 2 -m slimtron_distill run job.yaml --tp 2 --resume

exit codes: 0 done, 1 failed, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_job_arguments(parser)
    add_restart(parser, layouts=", in this layout or another")


def execute(args: argparse.Namespace) -> int:
    """Runs the job and prints the comparison."""
    config = job_config(args)

    from slimtron_common.checkpoint.kinds import KIND_OF_FORMAT
    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_common.report import print_comparison
    from slimtron_distill.job.preflight import preflight
    from slimtron_distill.job.run import run

    plan = preflight(config, resume=args.resume, overwrite=args.overwrite)
    comparison = run(plan, resume=args.resume, overwrite=args.overwrite)
    if rank_from_environment() == 0:
        print_comparison(comparison)
        for fact in ("Perplexity recovered", "Updates left out", "Speed"):
            print(f"{fact.lower():<22} {comparison.facts[fact]}")
        print(f"{'student':<22} {KIND_OF_FORMAT[config.export.export_format]}:{config.output}")
        print(f"{'report':<22} {config.output / 'report.html'}")
    return 0
