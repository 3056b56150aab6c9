"""``slimtron-quant plan``: every check of a job, and what it will cost, with nothing run."""

from __future__ import annotations

import argparse

from slimtron_quant.cli.job_arguments import add_job_arguments, job_config

HELP = "check a job and estimate its memory, disk and time, without running it"
EPILOG = """\
examples:
  slimtron-quant plan --model hf:smollm2 --recipe int4_awq --block-size auto --out out --data pydoc
  slimtron-quant plan job.yaml --tp 2

exit codes: 0 the job can run, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_job_arguments(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="allow for output that exists already"
    )


def execute(args: argparse.Namespace) -> int:
    """Checks the job and prints the plan."""
    config = job_config(args)

    from slimtron_quant.job.plan import print_plan
    from slimtron_quant.job.preflight import preflight

    # Nothing is started, so the processes are those that the job asks for.
    processes = config.parallel.min_world_size
    print_plan(preflight(config, overwrite=args.overwrite, world_size=processes))
    return 0
