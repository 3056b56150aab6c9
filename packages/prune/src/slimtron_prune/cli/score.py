"""``slimtron-prune score``: what is important in a model, written once for any number of cuts."""

from __future__ import annotations

import argparse

from slimtron_common.job_arguments import add_restart
from slimtron_prune.cli.job_arguments import (
    add_score_arguments,
    score_config,
)

HELP = "score a model's layers, heads, channels and experts, to cut smaller ones by"
EPILOG = """\
examples:
  slimtron-prune score --model hf:smollm2 --out scores --data pydoc --score-tokens 16384
  slimtron-prune run --model hf:smollm2 --scores scores --out smaller --data pydoc \\
      --hidden-size 512

exit codes: 0 done, 1 failed, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_score_arguments(parser)
    add_restart(parser)


def execute(args: argparse.Namespace) -> int:
    """Scores the model and prints where the scores lie."""
    config = score_config(args)

    from slimtron_common.parallel.context import rank_from_environment
    from slimtron_prune.job.preflight import preflight_scores
    from slimtron_prune.job.run import run_scores

    plan = preflight_scores(config, resume=args.resume, overwrite=args.overwrite)
    report = run_scores(plan, resume=args.resume, overwrite=args.overwrite)
    if rank_from_environment() == 0:
        print(f"{'least important layers':<24}{report.facts['Least important layers']}")
        print(f"{'scores':<24}{config.path}")
        print(f"{'report':<24}{config.path / 'report.html'}")
    return 0
