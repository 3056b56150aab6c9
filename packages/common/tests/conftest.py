from __future__ import annotations

from pathlib import Path

import pytest

from slimtron_common.testing.demo import demo_model_for_tests


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, real weights; do not change it."""
    return demo_model_for_tests(tmp_path_factory)
