"""The doctor's command in environments that are broken: metadata on disk, read by a new Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import packaging
import pytest
import tomllib

import slimtron_common

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

ENGINES = {
    "torch": "2.13.0",
    "megatron-core": "0.15.3",
    "nvidia-modelopt": "0.37.0",
    "nemo-toolkit": "2.7.3",
    "numpy": "1.26.4",
    "pyarrow": "24.0.0",
    "leptonai": "0.27.3",
    "nemo-run": "0.11.1",
    "inflect": "7.6.0",
    "lightning": "2.4.0",
    "tensorstore": "0.1.86",
    "tiktoken": "0.14.0",
    "transformers": "4.57.6",
}
NEMO_DECLARES = [
    "numpy>=1.22",
    "inflect; extra == 'common-only'",
    "lightning<=2.4.0,>2.2.1; extra == 'lightning'",
    "transformers~=4.57.0; extra == 'lightning'",
    "nemo-run; extra == 'run'",
    "kornia; extra == 'multimodal-only'",
]
NEMO = 'pip install "slimtron-common[nemo]"'

DOCTOR = """
import sys
sys.path[:0] = sys.argv[1:]
from slimtron_common.__main__ import main
sys.exit(main(["doctor", "--json"]))
"""


def write_metadata(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.3", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def own_requirements() -> list[str]:
    """The requirements of slimtron-common as a wheel declares them."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"].items()
    return [
        *project["dependencies"],
        *(f"{text}; extra == '{extra}'" for extra, texts in optional for text in texts),
    ]


def examine(folder: Path, change: Mapping[str, str | None]) -> tuple[int, dict[str, Any]]:
    """Runs the doctor where nothing is installed but ``ENGINES``, changed, and what it needs."""
    # Copies: beside an installed one lie all the others.
    for module in (packaging, slimtron_common):
        source = Path(str(module.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("*.pyc"))
    found = {**ENGINES, **change}
    declared = {"nemo-toolkit": NEMO_DECLARES, "megatron-core": ["numpy<2.0.0"]}
    own = own_requirements()
    for text in own:
        name = text.split(">=")[0]
        if "extra" not in text and name not in found:
            write_metadata(folder, name, text.split(">=")[1])
    write_metadata(folder, "slimtron-common", slimtron_common.__version__, own)
    for name, version in found.items():
        if version is not None:
            write_metadata(folder, name, version, declared.get(name, ()))
    # Isolated and without site: the packages of this environment are out of sight.
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", DOCTOR, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    # torch is metadata alone here, and is told to be so.
    told = [f for f in report["findings"] if (f["kind"], f["subject"]) != ("clash", "torch")]
    return run.returncode, {**report, "findings": told}


needs_python_of_nemo = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the line nemo is for Python 3.11"
)


@needs_python_of_nemo
def test_the_environment_that_is_not_broken(tmp_path: Path) -> None:
    _, report = examine(tmp_path, {})
    assert (report["line"], report["findings"]) == ("nemo", [])


@needs_python_of_nemo
@pytest.mark.parametrize(
    ("change", "kind", "subject", "message", "mend"),
    [
        (
            {"megatron-core": "0.16.1"},
            "clash",
            "nemo-toolkit 2.7.3, megatron-core 0.16.1",
            "cannot train",
            NEMO,
        ),
        (
            {"numpy": "2.4.6"},
            "clash",
            "megatron-core 0.15.3, numpy 2.4.6",
            "numpy.product",
            'pip install "numpy<2" "pyarrow<25"',
        ),
        (
            {"pyarrow": "26.0.1"},
            "clash",
            "pyarrow 26.0.1, numpy 1.26.4",
            "refuse NumPy 1",
            'pip install "pyarrow<25"',
        ),
        (
            {"leptonai": "0.47.0"},
            "clash",
            "nemo-run 0.11.1, leptonai 0.47.0",
            "leptonai.api.v1",
            "pip install leptonai==0.27.3",
        ),
        (
            {"inflect": None},
            "missing",
            "inflect",
            "nemo-toolkit[common-only,lightning,run] needs inflect",
            NEMO,
        ),
        (
            {"tensorstore": None},
            "missing",
            "tensorstore",
            "slimtron-common[nemo] needs tensorstore",
            NEMO,
        ),
        ({"transformers": "5.14.1"}, "warning", "transformers 5.14.1", "~=4.57.0", NEMO),
        (
            {"nvidia-modelopt": "0.36.0"},
            "warning",
            "nvidia-modelopt 0.36.0",
            "the line nemo",
            NEMO,
        ),
        (
            {"nvidia-modelopt": "0.47.0"},
            "note",
            "nemo-toolkit 2.7.3, nvidia-modelopt 0.47.0",
            "use Slimtron's Quantizer",
            None,
        ),
        (
            {"nemo-toolkit": "3.0.0"},
            "note",
            "nemo-toolkit 3.0.0",
            "no nemo.collections.llm",
            NEMO,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_broken_environment_is_told_with_the_command_that_mends_it(
    change: dict[str, str | None],
    kind: str,
    subject: str,
    message: str,
    mend: str | None,
    tmp_path: Path,
) -> None:
    code, report = examine(tmp_path, change)
    findings = {finding["subject"]: finding for finding in report["findings"]}
    assert subject in findings
    finding = findings[subject]
    assert (finding["kind"], finding["mend"]) == (kind, mend)
    assert message in finding["message"]
    assert code == 2  # at least for torch, which cannot be imported
    serious = {f["kind"] for f in report["findings"]} & {"missing", "clash"}
    assert bool(serious) is (kind in ("missing", "clash"))
