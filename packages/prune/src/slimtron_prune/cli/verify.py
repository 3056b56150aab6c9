"""``slimtron-prune verify``: read a pruned model back."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "reload a pruned model, check every file, and compare it with transformers"
EPILOG = """\
examples:
  slimtron-prune verify smaller
  slimtron-prune verify smaller --against hf:smollm2 --data pydoc

exit codes: 0 sound, 1 not what it claims, 2 refused
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the pruned model")
    parser.add_argument(
        "--against", metavar="KIND:DIR", help="the original, to measure the distance to"
    )
    parser.add_argument("--data", default="pydoc", metavar="SOURCE", help="text to measure on")
    parser.add_argument("--eval-tokens", type=int, default=4096, metavar="N", help="tokens")
    parser.add_argument("--eval-seq-len", type=int, default=512, metavar="N", help="tokens in one")


def execute(args: argparse.Namespace) -> int:
    """Checks the directory and prints what was found."""
    from slimtron_common.report import print_comparison
    from slimtron_prune.job.verify import verify_directory

    print_comparison(
        verify_directory(
            args.directory,
            against=args.against,
            source=args.data,
            num_tokens=args.eval_tokens,
            seq_length=args.eval_seq_len,
        )
    )
    print(f"{args.directory} is sound")
    return 0
