"""The command `slimtron-common`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slimtron_common.__about__ import __version__
from slimtron_common.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `slimtron-common` and returns its exit code."""
    return run_command(
        "slimtron-common",
        "Looks after the environment, checkpoints and demo model of the Slimtron packages.",
        "slimtron_common.cli",
        ("doctor", "demo_model", "inspect", "convert", "evaluate"),
        argv,
        version=__version__,
    )


if __name__ == "__main__":
    sys.exit(main())
