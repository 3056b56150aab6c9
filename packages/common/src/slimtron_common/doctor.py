"""Which supported line an environment is on, and what in it is missing or clashes.

`slimtron_common.lines` holds the knowledge, `diagnose` applies it to versions; reading these
imports nothing but metadata.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from slimtron_common.lines import EXTRAS, LINES, RULES, WRONGLY_DECLARED, Kind, Line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = [
    "Devices",
    "Diagnosis",
    "Finding",
    "Gpu",
    "check_devices",
    "diagnose",
    "read_devices",
    "read_environment",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something the user should know about the environment."""

    kind: Kind
    subject: str
    """What was found, with its version."""
    message: str
    mend: str | None = None
    """The command that mends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What `diagnose` found."""

    line: str | None
    """The name of the supported line, if it is one."""
    findings: tuple[Finding, ...] = ()

    @property
    def can_run(self) -> bool:
        """Whether nothing is missing and nothing clashes."""
        return all(finding.kind not in ("missing", "clash") for finding in self.findings)


_SLIMTRON = ("slimtron-common", "slimtron-quant", "slimtron-prune", "slimtron-distill")
_ENGINES = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "nemo-toolkit")


def read_environment() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Reads from metadata what `diagnose` takes.

    Returns:
        The versions of what is installed, and the requirements that Slimtron and the libraries it
        stands on declare for this Python, by the name of the one that declares them.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from slimtron_common.integrations.versions import declared_requirements, installed_versions

    declaring = installed_versions([*_SLIMTRON, *_ENGINES])
    python = platform.python_version()
    requirements = {
        name: [text for text in declared_requirements(name) if _applies(Requirement(text), python)]
        for name in declaring
    }
    names = {
        *(name for rule in RULES for name in rule.when),
        *(Requirement(text).name for rule in RULES for text in rule.without),
        *(extra.name for extra in EXTRAS),
        *(Requirement(text).name for texts in requirements.values() for text in texts),
    }
    others = sorted({canonicalize_name(name) for name in names} - declaring.keys())
    return {**declaring, **installed_versions(others)}, requirements


def diagnose(
    versions: Mapping[str, str],
    python: tuple[int, ...],
    requirements: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Diagnosis:
    """Applies lines, rules and the declared requirements to an environment.

    Args:
        versions: Normalized name (``megatron-core``) to version, of what is installed.
        python: The version of Python, ``(3, 11, 7)``.
        requirements: Name of an installed distribution to the requirements (PEP 508) it declares.
    """
    found = {"python": ".".join(map(str, python)), **versions}
    findings = [*_check_requirements(found, requirements), *_check_rules(found)]
    line = next((line for line in LINES if _is_on(line, found)), None)
    if line is None:
        findings.append(_off_line(found))
    order = ("missing", "clash", "warning", "note")
    findings.sort(key=lambda finding: order.index(finding.kind))
    return Diagnosis(line=None if line is None else line.name, findings=tuple(findings))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    capability: str
    """Compute capability, ``9.0``."""
    memory: int
    """In bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What torch, imported, says of the GPUs."""

    cuda: str | None = None
    """The version of CUDA that torch is built for; None: torch is a CPU build."""
    gpus: tuple[Gpu, ...] = ()
    driver: bool = False
    """Whether the system has a driver of NVIDIA."""
    error: str | None = None
    """Why torch cannot be imported."""


def read_devices() -> Devices:
    """Imports torch and asks it for the GPUs."""
    driver = Path("/proc/driver/nvidia/version").exists()
    try:
        import torch
    except (ImportError, OSError) as error:
        return Devices(driver=driver, error=str(error))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Devices(
        cuda=torch.version.cuda,
        driver=driver,
        gpus=tuple(
            Gpu(name=p.name, capability=f"{p.major}.{p.minor}", memory=p.total_memory)
            for p in properties
        ),
    )


def check_devices(devices: Devices) -> Iterator[Finding]:
    """Yields what keeps torch from the GPUs of this machine."""
    reinstall = "pip install --force-reinstall torch"
    if devices.error is not None:
        yield Finding(
            kind="clash",
            subject="torch",
            message=f"cannot be imported: {devices.error}",
            mend=reinstall,
        )
    elif devices.driver and devices.cuda is None:
        yield Finding(
            kind="warning",
            subject="torch",
            message="is a CPU build, though this machine has an NVIDIA driver",
            mend=reinstall,
        )
    elif devices.driver and not devices.gpus:
        yield Finding(
            kind="warning",
            subject="torch",
            message=f"sees no GPU: the NVIDIA driver may be too old for CUDA {devices.cuda}, or"
            " CUDA_VISIBLE_DEVICES hides them",
        )


def _check_requirements(
    found: Mapping[str, str], requirements: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for owner, texts in requirements.items():
        for requirement in map(Requirement, texts):
            name = canonicalize_name(requirement.name)
            if not _applies(requirement, found["python"]) or (owner, name) in WRONGLY_DECLARED:
                continue
            wanted = f"{requirement.name}{requirement.specifier}"
            mend = f'pip install "{wanted}"'
            if name not in found:
                yield Finding(
                    kind="missing", subject=name, message=f"{owner} needs {wanted}", mend=mend
                )
            elif not _matches(found[name], str(requirement.specifier)):
                yield Finding(
                    kind="clash" if owner in _SLIMTRON else "warning",
                    subject=f"{name} {found[name]}",
                    message=f"{owner} needs {wanted}",
                    mend=mend,
                )


def _applies(requirement: Requirement, python: str) -> bool:
    environment = {
        "extra": "",
        "python_full_version": python,
        "python_version": ".".join(python.split(".")[:2]),
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)


def _check_rules(found: Mapping[str, str]) -> Iterator[Finding]:
    for rule in RULES:
        if not all(n in found and _matches(found[n], spec) for n, spec in rule.when.items()):
            continue
        absent = [text for text in rule.without if text.partition("==")[0] not in found]
        if rule.without and not absent:
            continue
        yield Finding(
            kind=rule.kind,
            subject=", ".join(f"{name} {found[name]}" for name in rule.when),
            message=": ".join(filter(None, (rule.message, ", ".join(absent)))),
            mend=f"pip install {' '.join(absent)}" if absent else rule.mend,
        )


def _is_on(line: Line, found: Mapping[str, str]) -> bool:
    return all(name in found for name in line.needs) and not list(_strays(line, found))


def _strays(line: Line, found: Mapping[str, str]) -> Iterator[str]:
    for name, specifier in {"python": line.python, **line.versions}.items():
        if name in found and not _matches(found[name], specifier):
            yield name


def _off_line(found: Mapping[str, str]) -> Finding:
    nemo, mcore016, mcore019 = LINES
    if "nemo-toolkit" in found and _matches(found["nemo-toolkit"], "<3"):
        nearest = nemo
    else:
        nearest = mcore019 if _matches(found["python"], mcore019.python) else mcore016
    differing = {name: f"{name} {found[name]}" for name in _strays(nearest, found)}
    differing |= {name: f"no {name}" for name in nearest.needs if name not in found}
    wanted = {"python": nearest.python, **nearest.versions}
    return Finding(
        kind="warning",
        subject=", ".join(differing.values()),
        message=f"not tested; the line {nearest.name} ({nearest.purpose}) has "
        + ", ".join(f"{name}{wanted[name]}" for name in differing),
        mend=nearest.install,
    )


def _matches(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    # NVIDIA's containers hold builds from before a release, named 2.8.0a0+5228986c39: they count
    # as the release.
    return SpecifierSet(specifier).contains(Version(version).base_version)
