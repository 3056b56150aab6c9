"""The frame of the commands: one module a subcommand, light to import.

A subcommand module holds `HELP`, `EPILOG` (commands that run as they stand), `register` and
`execute`; its name with dashes is the subcommand's. Whatever is slow to import, it imports inside
`execute`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from slimtron_common.errors import SlimtronError
from slimtron_common.logging import setup_logging

__all__ = ["Command", "run_command"]


class Command(Protocol):
    """What the module of a subcommand holds."""

    HELP: str
    """One line, for the list of subcommands."""
    EPILOG: str
    """Commands that run as they stand."""

    def register(self, parser: argparse.ArgumentParser) -> None:
        """Adds the subcommand's arguments to its parser."""

    def execute(self, args: argparse.Namespace) -> int:
        """Does the work and returns the exit code."""


def run_command(
    prog: str,
    description: str,
    package: str,
    subcommands: Sequence[str],
    argv: Sequence[str] | None = None,
    *,
    version: str,
) -> int:
    """Runs one subcommand: parses, sets up logging, executes, and reports what went wrong.

    Args:
        prog: The command's name.
        description: What the command is for.
        package: The package whose modules are the subcommands.
        subcommands: The names of these modules, in the order of the help.
        argv: The arguments; those of the process by default.
        version: What ``--version`` prints.

    Returns:
        The exit code: the subcommand's own, or 1 failed, 2 refused, 130 interrupted.

    Raises:
        SystemExit: From argparse: 2 for bad arguments, 0 after ``--help`` and ``--version``.
    """
    args = _build_parser(prog, description, package, subcommands, version).parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(args.verbose - args.quiet, rank)
    if not args.verbose:
        # At every import Megatron-Core tells what is not installed; `doctor` says it once.
        warnings.filterwarnings("ignore", module=r"(megatron|modelopt)\.")
    who = f"{prog} {args.subcommand}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        who = f"[rank {rank}] {who}"
    try:
        return cast(int, args.execute(args))
    except SlimtronError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"{who}: failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _build_parser(
    prog: str, description: str, package: str, subcommands: Sequence[str], version: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{prog} {version}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    for name in subcommands:
        command = cast(Command, import_module(f"{package}.{name}"))
        subparser = subparsers.add_parser(
            name.replace("_", "-"),
            help=command.HELP,
            description=command.HELP,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.register(subparser)
        logs = subparser.add_argument_group("logs (on stderr)")
        logs.add_argument("-v", "--verbose", action="count", default=0, help="tell more")
        logs.add_argument("-q", "--quiet", action="count", default=0, help="tell less")
        subparser.set_defaults(execute=command.execute)
    return parser
