"""Which supported line an environment is on, and what in it is missing or clashes.

`slimtron_common.lines` holds the knowledge, `diagnose` applies it to versions; reading these
imports nothing but metadata.
"""

from __future__ import annotations

import platform
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from slimtron_common.lines import EXTRAS, LINES, NEMO_EXTRA, RULES, Kind, Line, Rule

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
_TRANSFORMER_ENGINES = {"transformer-engine-cu12": "12", "transformer-engine-cu13": "13"}
"""Distribution to the CUDA that it is built for."""


def read_environment() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Reads from metadata what `diagnose` takes.

    Returns:
        The versions of what is installed, and the requirements that Slimtron and the libraries it
        stands on declare for this Python, by the name of the one that declares them. Beside NeMo 2
        these include what the line nemo needs, by name and extras: NeMo declares most of what it
        always imports as optional.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from slimtron_common.integrations.versions import installed_versions

    declaring = installed_versions([*_SLIMTRON, *_ENGINES])
    requirements = {name: _declared(name) for name in declaring}
    if "nemo-toolkit" in declaring and _matches(declaring["nemo-toolkit"], "<3"):
        extras = [f"{name}[{NEMO_EXTRA}]" for name in _SLIMTRON if name in declaring]
        requirements |= {owner: _declared(owner) for owner in extras}
        for text in requirements.get(f"slimtron-common[{NEMO_EXTRA}]", ()):
            if (needed := Requirement(text)).extras and needed.name in declaring:
                owner = f"{needed.name}[{','.join(sorted(needed.extras))}]"
                requirements[owner] = _declared(owner)
    names = {
        *(name for rule in RULES for name in rule.when),
        *(extra.name for extra in EXTRAS),
        *_TRANSFORMER_ENGINES,
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
        requirements: Name of an installed distribution, or name and extras (``a[b]``), to the
            requirements (PEP 508) it declares.
    """
    found = {"python": ".".join(map(str, python)), **versions}
    clashing = [rule for rule in RULES if rule.kind == "clash" and _applies_to(rule, found)]
    told = {name for rule in clashing for name in rule.when}
    findings = [*_check_requirements(found, requirements, told), *_check_rules(found)]
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


def check_devices(devices: Devices, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yields what keeps torch or Transformer Engine from the GPUs of this machine.

    Args:
        devices: What torch says.
        versions: Normalized name to version, of what is installed.
    """
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
    if devices.error is None:
        yield from _check_transformer_engine(devices.cuda, versions)


def _check_transformer_engine(cuda: str | None, versions: Mapping[str, str]) -> Iterator[Finding]:
    major = None if cuda is None else cuda.partition(".")[0]
    for name, built_for in _TRANSFORMER_ENGINES.items():
        if name not in versions or built_for == major:
            continue
        if major is None:
            message = "is for GPUs, torch is a CPU build"
            mend = f"pip uninstall -y transformer-engine {name}"
        else:
            message = f"is built for CUDA {built_for}, torch for CUDA {cuda}"
            mend = (
                f"pip uninstall -y {name} && pip install --no-build-isolation"
                f' "transformer-engine[core_cu{major},pytorch]"'
            )
        yield Finding(
            kind="clash" if major else "warning",
            subject=f"{name} {versions[name]}",
            message=message,
            mend=mend,
        )


def _check_requirements(
    found: Mapping[str, str], requirements: Mapping[str, Sequence[str]], told: Container[str]
) -> Iterator[Finding]:
    """Compares with what is declared; says nothing of versions in ``told``."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for owner, texts in requirements.items():
        for requirement in map(Requirement, texts):
            name = canonicalize_name(requirement.name)
            if not _applies(requirement, found["python"], Requirement(owner).extras):
                continue
            wanted = f"{requirement.name}{requirement.specifier}"
            mend = _mend(owner, wanted)
            if name not in found:
                yield Finding(
                    kind="missing", subject=name, message=f"{owner} needs {wanted}", mend=mend
                )
            elif not _matches(found[name], str(requirement.specifier)) and name not in told:
                yield Finding(
                    kind="clash" if owner in _SLIMTRON else "warning",
                    subject=f"{name} {found[name]}",
                    message=f"{owner} needs {wanted}",
                    mend=mend,
                )


def _mend(owner: str, wanted: str) -> str:
    """The command that installs ``wanted``; of the line nemo, all of it, which agrees."""
    name, _, extras = owner.partition("[")
    if not extras:
        return f'pip install "{wanted}"'
    return f'pip install "{name if name in _SLIMTRON else "slimtron-common"}[{NEMO_EXTRA}]"'


def _declared(owner: str) -> list[str]:
    """What a distribution (``a``) or its extras alone (``a[b]``) need on this Python."""
    from packaging.requirements import Requirement

    from slimtron_common.integrations.versions import declared_requirements

    extras, python = Requirement(owner).extras, platform.python_version()
    return [
        text
        for text in declared_requirements(Requirement(owner).name)
        if _applies(Requirement(text), python, extras)
        and not (extras and _applies(Requirement(text), python))
    ]


def _applies(requirement: Requirement, python: str, extras: Iterable[str] = ()) -> bool:
    environment = {
        "python_full_version": python,
        "python_version": ".".join(python.split(".")[:2]),
    }
    return requirement.marker is None or any(
        requirement.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
    )


def _check_rules(found: Mapping[str, str]) -> Iterator[Finding]:
    for rule in RULES:
        if _applies_to(rule, found):
            yield Finding(
                kind=rule.kind,
                subject=", ".join(f"{name} {found[name]}" for name in rule.when),
                message=rule.message,
                mend=rule.mend,
            )


def _applies_to(rule: Rule, found: Mapping[str, str]) -> bool:
    return all(name in found and _matches(found[name], spec) for name, spec in rule.when.items())


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
