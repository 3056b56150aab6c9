"""``slimtron-quant recipes``: the formats, where they run and how accurate they are."""

from __future__ import annotations

import argparse

HELP = "list the recipes"
EPILOG = """\
examples:
  slimtron-quant recipes
  slimtron-quant recipes --json
  slimtron-quant recipes modelopt:NVFP4_MLP_ONLY_CFG
  slimtron-quant recipes --modelopt
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="only these: names, modelopt:NAME, or recipe files",
    )
    parser.add_argument(
        "--modelopt",
        action="store_true",
        help="list the configs of the installed ModelOpt, which run as modelopt:NAME",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    """Prints the recipes."""
    import json
    from dataclasses import asdict

    from slimtron_quant.recipes import RECIPES
    from slimtron_quant.recipes.sources import load_source, modelopt_names

    if args.modelopt:
        names = modelopt_names()
        print(json.dumps(names, indent=2) if args.json else "\n".join(names))
        return 0
    recipes = [
        RECIPES[name] if name in RECIPES else load_source(name, where="RECIPE").recipe
        for name in args.recipes or RECIPES
    ]
    if args.json:
        print(json.dumps([asdict(recipe) for recipe in recipes], indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what, where and how well", show_lines=True)
    for recipe in recipes:
        needs = ["text"] * recipe.needs_calibration + ["a GPU"] * recipe.needs_cuda
        facts = [recipe.name, f"W{recipe.weight_bits} A{recipe.activation_bits}"]
        if recipe.block_size is not None:
            facts.append(f"blocks of {recipe.block_size}")
        if recipe.kv_cache is not None:
            facts.append(f"KV cache {recipe.kv_cache}")
        if needs:
            facts.append(f"needs {' and '.join(needs)}")
        table.add_row(
            "\n".join(facts),
            f"{recipe.summary}\naccuracy: {recipe.accuracy}\nGPUs: {recipe.hardware}\n"
            f"engines: {recipe.engines}",
        )
    Console().print(table)
    print("Any of them, or none, goes with `--kv-cache fp8` or `--kv-cache nvfp4`.")
    return 0
