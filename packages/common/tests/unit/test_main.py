from __future__ import annotations

import re
import subprocess
import sys

import pytest

from slimtron_common.__about__ import __version__
from slimtron_common.__main__ import main


def test_every_subcommand_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for name in ("doctor", "demo-model", "inspect", "convert", "evaluate"):
        assert re.search(rf"^    {name}\s", out, re.MULTILINE)


def test_it_runs_as_a_module() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "slimtron_common", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout == f"slimtron-common {__version__}\n"
