"""``slimtron-distill plan``: every check of a job, and what it will take, with nothing run."""

from __future__ import annotations

import argparse

from slimtron_distill.cli.job_arguments import add_job_arguments, job_config

HELP = "check a job and show its memory per process and its disk, without running it"
EPILOG = """\
examples:
  slimtron-distill plan --student hf:student --teacher hf:smollm2 --out distilled --steps 200
  slimtron-distill plan job.yaml --tp 2 --processes 8

exit codes: 0 the job can run, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_job_arguments(parser)
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="how many there will be; without it, those of one copy of the model",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="allow for output that exists already"
    )


def execute(args: argparse.Namespace) -> int:
    """Checks the job and prints the plan."""
    config = job_config(args)

    from slimtron_distill.job.plan import print_plan
    from slimtron_distill.job.preflight import preflight

    processes = args.processes or config.parallel.model_parallel_size
    print_plan(preflight(config, overwrite=args.overwrite, world_size=processes))
    return 0
