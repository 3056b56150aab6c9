"""`slimtron-common doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from slimtron_common.doctor import (
    Devices,
    Diagnosis,
    Finding,
    check_devices,
    diagnose,
    read_devices,
    read_environment,
)
from slimtron_common.lines import EXTRAS, LINES

if TYPE_CHECKING:
    from rich.console import Console

HELP = "Tell whether this environment can run Slimtron, and how to mend it."
EPILOG = """\
Examples:
  slimtron-common doctor
  slimtron-common doctor --json

Exit code: 0 it can, 2 something is missing or clashes.
"""

_COLOURS = {"missing": "red", "clash": "red", "warning": "yellow", "note": "cyan"}


def register(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def execute(args: argparse.Namespace) -> int:
    """Examines the environment and prints what it found."""
    versions, requirements = read_environment()
    devices = read_devices()
    diagnosis = diagnose(versions, sys.version_info[:3], requirements)
    diagnosis = dataclasses.replace(
        diagnosis, findings=(*check_devices(devices, versions), *diagnosis.findings)
    )
    if args.json:
        print(json.dumps(_to_json(versions, devices, diagnosis), indent=2))
    else:
        _print(versions, requirements, devices, diagnosis)
    return 0 if diagnosis.can_run else 2


def _to_json(
    versions: Mapping[str, str], devices: Devices, diagnosis: Diagnosis
) -> dict[str, object]:
    return {
        "can_run": diagnosis.can_run,
        "line": diagnosis.line,
        "python": platform.python_version(),
        "versions": dict(sorted(versions.items())),
        "devices": dataclasses.asdict(devices),
        "extras": {
            extra.name: {
                "version": versions.get(extra.name),
                "means": extra.gives if extra.name in versions else extra.lacks,
                "install": extra.install,
            }
            for extra in EXTRAS
        },
        "findings": [dataclasses.asdict(finding) for finding in diagnosis.findings],
    }


def _print(
    versions: Mapping[str, str], names: Iterable[str], devices: Devices, diagnosis: Diagnosis
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    packages = [("python", platform.python_version())]
    packages += [(name, versions[name]) for name in names if name in versions]
    table = Table("package", "version")
    for row in packages:
        table.add_row(*row)
    console.print(table)
    _print_extras(console, versions)
    _print_devices(console, devices)
    line = next((line for line in LINES if line.name == diagnosis.line), None)
    console.print(f"Line: {'none' if line is None else f'{line.name} ({line.purpose})'}")
    _print_findings(console, diagnosis.findings)
    if diagnosis.can_run:
        console.print("[green]This environment can run Slimtron.[/green]")
    else:
        console.print("[red]This environment cannot run Slimtron as it is.[/red]")


def _print_extras(console: Console, versions: Mapping[str, str]) -> None:
    console.print("Optional:")
    for extra in EXTRAS:
        if extra.name in versions:
            _print_line(console, f"  {extra.name} {versions[extra.name]}: {extra.gives}")
        else:
            _print_line(console, f"  {extra.name} is absent: {extra.lacks}")
            _print_line(console, f"    {extra.install}")


def _print_devices(console: Console, devices: Devices) -> None:
    build = "a CPU build" if devices.cuda is None else f"built for CUDA {devices.cuda}"
    console.print(f"GPUs: {len(devices.gpus) or 'none'}; torch is {build}")
    for gpu in devices.gpus:
        console.print(
            f"  {gpu.name}, {gpu.memory / 2**30:.0f} GiB, compute capability {gpu.capability}"
        )


def _print_findings(console: Console, findings: Iterable[Finding]) -> None:
    for finding in findings:
        colour = _COLOURS[finding.kind]
        console.print(f"[{colour}]{finding.kind}[/{colour}]", end=" ")
        _print_line(console, f"{finding.subject}: {finding.message}")
        if finding.mend is not None:
            _print_line(console, f"  {finding.mend}")


def _print_line(console: Console, text: str) -> None:
    """Prints text as it is and without wrapping, so that commands can be copied."""
    console.print(text, markup=False, soft_wrap=True)
