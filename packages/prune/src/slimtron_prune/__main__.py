"""The command ``slimtron-prune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slimtron_common.cli import run_command
from slimtron_prune.__about__ import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(
        "slimtron-prune",
        "Prune Megatron-Core and NeMo 2 language models, proved before and after.",
        "slimtron_prune.cli",
        ["run", "plan", "score", "verify"],
        argv,
        version=__version__,
    )


if __name__ == "__main__":
    sys.exit(main())
