"""The command ``slimtron-distill``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slimtron_common.cli import run_command
from slimtron_distill.__about__ import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(
        "slimtron-distill",
        "Teach a small Megatron-Core language model what a large one knows.",
        "slimtron_distill.cli",
        ["run", "plan", "export", "verify"],
        argv,
        version=__version__,
    )


if __name__ == "__main__":
    sys.exit(main())
