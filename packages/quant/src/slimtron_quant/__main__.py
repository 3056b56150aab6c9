"""The command ``slimtron-quant``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slimtron_common.cli import run_command
from slimtron_quant.__about__ import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(
        "slimtron-quant",
        "Quantize Megatron-Core and NeMo 2 language models, proved before and after.",
        "slimtron_quant.cli",
        ["run", "plan", "export", "verify", "recipes", "report"],
        argv,
        version=__version__,
    )


if __name__ == "__main__":
    sys.exit(main())
