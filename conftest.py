"""Marks tests by the folder they lie in, and skips those that need a GPU where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folders = Path(item.path).parts
        for name in ("ranks", "gpu"):
            if name in folders:
                item.add_marker(name)
        if "gpu" in folders and not _gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
