"""Versions and declared requirements of what is installed, from metadata: nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

__all__ = ["declared_requirements", "installed_versions"]


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those of the distributions ``names`` that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def declared_requirements(name: str) -> list[str]:
    """Returns the requirements (PEP 508) that an installed distribution declares."""
    return requires(name) or []
