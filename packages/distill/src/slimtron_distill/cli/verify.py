"""``slimtron-distill verify``: read a student back and measure it against its teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "check every file of a distilled student and measure it on text"
EPILOG = """\
examples:
  slimtron-distill verify distilled
  slimtron-distill verify distilled --teacher hf:smollm2 --data pydoc

exit codes: 0 sound, 2 damaged or refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the student")
    parser.add_argument(
        "--teacher", metavar="KIND:DIR", help="the teacher, to measure the distance to"
    )
    parser.add_argument("--data", default="pydoc", metavar="SOURCE", help="text to measure on")
    parser.add_argument("--eval-tokens", type=int, default=4096, metavar="N", help="tokens")
    parser.add_argument("--eval-seq-len", type=int, default=512, metavar="N", help="tokens in one")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def execute(args: argparse.Namespace) -> int:
    """Checks the directory and prints what was found."""
    from slimtron_common.checkpoint.kinds import kind_of
    from slimtron_common.evaluation.config import EvaluationConfig
    from slimtron_common.evaluation.measure import measure, plan_evaluation
    from slimtron_common.manifest import verify_manifest
    from slimtron_common.report import print_comparison

    verify_manifest(args.directory)
    kind = kind_of(args.directory)
    evaluation = EvaluationConfig(
        source=args.data, num_tokens=args.eval_tokens, seq_length=args.eval_seq_len
    )
    plan = plan_evaluation(
        f"{kind}:{args.directory}", evaluation, against=args.teacher, device=args.device
    )
    print_comparison(measure(plan))
    print(f"{args.directory} is sound")
    return 0
