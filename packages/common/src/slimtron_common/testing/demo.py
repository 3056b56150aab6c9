"""The demo model for tests, written once for all workers of a test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slimtron_common.demo_model import write_demo_model
from slimtron_common.errors import CheckpointError, MissingDependencyError

__all__ = ["demo_model_for_tests"]


def demo_model_for_tests(factory: pytest.TempPathFactory) -> Path:
    """Returns SmolLM2's directory; skips the test where its package is not installed.

    Args:
        factory: pytest's; the workers of pytest-xdist share its parent folder.
    """
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "smollm2"
    if not path.exists():
        try:
            write_demo_model(path)
        except MissingDependencyError as error:
            pytest.skip(error.message)
        except CheckpointError:
            # Another worker was faster.
            if not path.exists():
                raise
    return path
