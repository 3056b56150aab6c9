"""``slimtron-quant report``: print one report, or put two side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "print the report of an output, or compare the reports of two"
EPILOG = """\
examples:
  slimtron-quant report smollm2-fp8
  slimtron-quant report smollm2-fp8 smollm2-int4
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("before", type=Path, metavar="BEFORE", help="an output directory")
    parser.add_argument("after", type=Path, nargs="?", metavar="AFTER", help="another one")


def execute(args: argparse.Namespace) -> int:
    """Prints the report or the comparison."""
    from slimtron_common.report import Column, Comparison, print_comparison, read_report

    before = read_report(args.before)
    if args.after is None:
        print_comparison(before)
        return 0
    after = read_report(args.after)
    # The last column is what was delivered.
    columns = (
        Column(before.columns[0].name, before.columns[0].metrics),
        Column(str(args.before), before.columns[-1].metrics),
        Column(str(args.after), after.columns[-1].metrics),
    )
    print_comparison(Comparison(f"{before.title}, {after.title}", columns, metrics=before.metrics))
    return 0
