from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The interpreter cuts digits off where a GPU rounds to bf16.
CHECKS = """\
from packages.distill.tests.kd_kernels import check_layouts, check_values
from packages.distill.tests.kd_oracle import SETTINGS

check_values(
    "cpu", (3, 1, 37), settings=SETTINGS[1::2], kinds=("normal", "huge", "impossible"), bf16=8e-3
)
check_layouts("cpu")
"""


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECKS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
