"""Tests that need a newer version of a library than a line has."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

__all__ = ["SHARED_EXPERTS", "needs"]


def needs(distribution: str, minimum: str, *, what: str) -> pytest.MarkDecorator:
    """Skips a test where a library is too old.

    Args:
        distribution: Its name.
        minimum: The first version that will do.
        what: What older ones lack.
    """
    found = version(distribution)
    return pytest.mark.skipif(
        Version(found) < Version(minimum),
        reason=f"{distribution} {found} lacks {what}: needs {minimum}",
    )


SHARED_EXPERTS = needs("megatron-core", "0.16", what="a gate of shared experts")
