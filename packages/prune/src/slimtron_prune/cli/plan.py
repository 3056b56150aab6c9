"""``slimtron-prune plan``: every check of a job, and what it will cost, with nothing run."""

from __future__ import annotations

import argparse

from slimtron_prune.cli.job_arguments import add_prune_arguments, prune_config

HELP = "check a job and estimate its memory and disk, without running it"
EPILOG = """\
examples:
  slimtron-prune plan --model hf:smollm2 --out out --data pydoc --hidden-size 512
  slimtron-prune plan job.yaml --tp 3

exit codes: 0 the job can run, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_prune_arguments(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="allow for output that exists already"
    )


def execute(args: argparse.Namespace) -> int:
    """Checks the job and prints the plan."""
    config = prune_config(args)

    from slimtron_prune.job.plan import print_plan
    from slimtron_prune.job.preflight import preflight

    # Nothing is started, so the processes are those that the job asks for.
    processes = config.parallel.model_parallel_size
    print_plan(preflight(config, overwrite=args.overwrite, world_size=processes))
    return 0
