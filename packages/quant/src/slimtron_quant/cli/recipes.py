"""``slimtron-quant recipes``: the formats, where they run and how accurate they are."""

from __future__ import annotations

import argparse

HELP = "list the recipes"
EPILOG = """\
examples:
  slimtron-quant recipes
  slimtron-quant recipes --json
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    """Prints the recipes."""
    import json
    from dataclasses import asdict

    from slimtron_quant.recipes import RECIPES

    if args.json:
        print(json.dumps([asdict(recipe) for recipe in RECIPES.values()], indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "bits", "what", "accuracy", "GPUs", "engines", show_lines=True)
    for recipe in RECIPES.values():
        table.add_row(
            recipe.name,
            f"W{recipe.weight_bits} A{recipe.activation_bits}",
            recipe.summary,
            recipe.accuracy,
            recipe.hardware,
            recipe.engines,
        )
    Console().print(table)
    return 0
