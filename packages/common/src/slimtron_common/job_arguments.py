"""The arguments that every command's jobs have: a YAML file, flags for its fields, ``--set``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "Flag",
    "add_config",
    "add_flags",
    "add_restart",
    "add_sequence_parallel",
    "add_set",
    "config_flags",
]

Flag = tuple[str, str, Any, str, str]
"""Flag, dotted field of the config, type, metavar, help."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the job file."""
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="the job's settings"
    )


def add_flags(group: Any, flags: Iterable[Flag]) -> None:
    """Adds a flag for each field."""
    for flag, field, kind, metavar, text in flags:
        group.add_argument(flag, dest=field, type=kind, metavar=metavar, help=text)


def add_sequence_parallel(group: Any) -> None:
    """Adds ``--sequence-parallel``."""
    group.add_argument(
        "--sequence-parallel",
        dest="parallel.sequence_parallel",
        action="store_true",
        default=None,
        help="cut activations over the tensor-parallel processes",
    )


def add_set(parser: argparse.ArgumentParser, *, example: str) -> None:
    """Adds ``--set``, with an example of a field and its value."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"sets any field of the config, such as {example}",
    )


def add_restart(parser: argparse.ArgumentParser, *, layouts: str = "") -> None:
    """Adds what to do about output that is there.

    Args:
        parser: The subcommand's.
        layouts: What ``--resume`` says of layouts.
    """
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help=f"go on with the unfinished run of this output{layouts}",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace an existing output")


def config_flags(args: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """Returns what was given for fields of a config, by their dotted paths.

    Args:
        args: The parsed arguments.
        cls: The config's dataclass.
    """
    fields = cls.__dataclass_fields__
    return {name: value for name, value in vars(args).items() if name.split(".")[0] in fields}
