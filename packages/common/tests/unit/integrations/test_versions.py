from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from slimtron_common.integrations.versions import declared_requirements, installed_versions


def test_versions_of_what_is_installed_alone() -> None:
    assert installed_versions(["pytest", "no-such-distribution"]) == {"pytest": version("pytest")}


def test_requirements_are_those_of_the_metadata() -> None:
    assert any(text.startswith("torch") for text in declared_requirements("slimtron-common"))
    with pytest.raises(PackageNotFoundError):
        declared_requirements("no-such-distribution")
