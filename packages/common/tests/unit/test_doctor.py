from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from slimtron_common.doctor import (
    Devices,
    Diagnosis,
    Gpu,
    check_devices,
    diagnose,
    read_devices,
    read_environment,
)
from slimtron_common.lines import LINES, RULES

PY310, PY311, PY312, PY313 = (3, 10, 14), (3, 11, 7), (3, 12, 1), (3, 13, 0)

MCORE016 = {
    "megatron-core": "0.16.1",
    "nvidia-modelopt": "0.47.0",
    "transformers": "5.14.1",
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
}
MCORE019 = {**MCORE016, "megatron-core": "0.19.2"}
NEMO = {
    "nemo-toolkit": "2.7.3",
    "megatron-core": "0.15.3",
    "nvidia-modelopt": "0.37.0",
    "transformers": "4.57.6",
    "numpy": "1.26.4",
    "leptonai": "0.27.3",
    "nemo-run": "0.11.1",
}


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


def summary(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(finding.kind, finding.subject) for finding in diagnosis.findings]


@pytest.mark.parametrize(
    ("versions", "python", "line"),
    [
        (MCORE016, PY310, "mcore016"),
        (MCORE016, PY311, "mcore016"),
        (MCORE019, PY312, "mcore019"),
        (MCORE019, PY313, "mcore019"),
        (NEMO, PY311, "nemo"),
        (without(MCORE016, "nvidia-modelopt"), PY311, "mcore016"),
        ({**MCORE016, "torch": "2.13.0a0+5228986c39"}, PY311, "mcore016"),
    ],
)
def test_the_supported_lines_have_nothing_to_mend(
    versions: dict[str, str], python: tuple[int, ...], line: str
) -> None:
    diagnosis = diagnose(versions, python)
    assert diagnosis == Diagnosis(line=line)
    assert diagnosis.can_run


@pytest.mark.parametrize(
    ("versions", "python", "nearest", "subject"),
    [
        (MCORE016, PY312, "mcore019", "megatron-core 0.16.1"),
        ({**MCORE019, "megatron-core": "0.17.0"}, PY312, "mcore019", "megatron-core 0.17.0"),
        ({**MCORE016, "megatron-core": "0.16.0rc0"}, PY311, "mcore016", "megatron-core 0.16.0rc0"),
        ({**MCORE016, "nvidia-modelopt": "0.43"}, PY311, "mcore016", "nvidia-modelopt 0.43"),
        ({}, PY311, "mcore016", "no megatron-core"),
        (NEMO, PY312, "nemo", "python 3.12.1"),
        ({**NEMO, "nemo-toolkit": "2.6.0"}, PY311, "nemo", "nemo-toolkit 2.6.0"),
    ],
)
def test_off_the_lines_the_nearest_is_told_and_how_to_get_there(
    versions: dict[str, str], python: tuple[int, ...], nearest: str, subject: str
) -> None:
    diagnosis = diagnose(versions, python)
    assert diagnosis.line is None
    (finding,) = diagnosis.findings
    assert (finding.kind, finding.subject) == ("warning", subject)
    assert f"the line {nearest} " in finding.message
    assert finding.mend == next(line.install for line in LINES if line.name == nearest)
    assert diagnosis.can_run


@pytest.mark.parametrize(
    ("versions", "python", "kind", "subject", "mend"),
    [
        (
            {**NEMO, "megatron-core": "0.16.1"},
            PY311,
            "clash",
            "nemo-toolkit 2.7.3, megatron-core 0.16.1",
            'pip install "slimtron-common[nemo]"',
        ),
        (
            {**NEMO, "leptonai": "0.47.0"},
            PY311,
            "clash",
            "nemo-run 0.11.1, leptonai 0.47.0",
            "pip install leptonai==0.27.3",
        ),
        (
            MCORE019,
            PY311,
            "clash",
            "python 3.11.7, megatron-core 0.19.2",
            "pip install megatron-core==0.16.1",
        ),
        (
            {**MCORE016, "transformers": "5.15.0"},
            PY311,
            "warning",
            "nvidia-modelopt 0.47.0, transformers 5.15.0",
            'pip install "transformers>=4.57,<5.15"',
        ),
        (
            {**NEMO, "numpy": "2.4.6"},
            PY311,
            "clash",
            "megatron-core 0.15.3, numpy 2.4.6",
            'pip install "numpy<2" "pyarrow<25"',
        ),
        (
            {**NEMO, "pyarrow": "26.0.1"},
            PY311,
            "clash",
            "pyarrow 26.0.1, numpy 1.26.4",
            'pip install "pyarrow<25"',
        ),
        (
            {**NEMO, "nvidia-modelopt": "0.47.0"},
            PY311,
            "note",
            "nemo-toolkit 2.7.3, nvidia-modelopt 0.47.0",
            None,
        ),
        (
            {**MCORE016, "nemo-toolkit": "3.0.0"},
            PY311,
            "note",
            "nemo-toolkit 3.0.0",
            'pip install "slimtron-common[nemo]"',
        ),
    ],
)
def test_what_is_known_of_versions_together(
    versions: dict[str, str], python: tuple[int, ...], kind: str, subject: str, mend: str | None
) -> None:
    diagnosis = diagnose(versions, python)
    first = diagnosis.findings[0]
    assert (first.kind, first.subject, first.mend) == (kind, subject, mend)
    assert diagnosis.can_run is (kind not in ("missing", "clash"))


def test_declared_requirements_are_checked() -> None:
    requirements = {
        "slimtron-common": [
            "torch>=2.8",
            "pyyaml>=6.0",
            "rich>=13; python_version < '3'",
            "gguf; extra == 'demo'",
            "Typing_Extensions",
        ],
        "transformers": ["huggingface-hub<2,>=1.5"],
    }
    versions = {
        **MCORE016,
        "torch": "2.7.1",
        "typing-extensions": "4.16",
        "huggingface-hub": "0.36.2",
    }
    diagnosis = diagnose(versions, PY311, requirements)
    assert [(f.kind, f.subject, f.message, f.mend) for f in diagnosis.findings] == [
        ("missing", "pyyaml", "slimtron-common needs pyyaml>=6.0", 'pip install "pyyaml>=6.0"'),
        ("clash", "torch 2.7.1", "slimtron-common needs torch>=2.8", 'pip install "torch>=2.8"'),
        (
            "warning",
            "huggingface-hub 0.36.2",
            "transformers needs huggingface-hub<2,>=1.5",
            'pip install "huggingface-hub<2,>=1.5"',
        ),
    ]


def test_markers_are_evaluated_for_the_python_that_is_asked_about() -> None:
    requirements = {"slimtron-common": ["tomli; python_version < '3.11'"]}
    assert summary(diagnose(MCORE016, PY310, requirements)) == [("missing", "tomli")]
    assert diagnose(MCORE016, PY311, requirements).findings == ()


def test_a_build_before_a_release_counts_as_the_release() -> None:
    requirements = {"slimtron-common": ["torch>=2.8"]}
    versions = {**MCORE016, "torch": "2.8.0a0+5228986c39.nv25.5"}
    assert diagnose(versions, PY311, requirements).findings == ()


def test_the_worst_comes_first() -> None:
    versions = {**NEMO, "leptonai": "0.47.0", "nvidia-modelopt": "0.47.0", "huggingface-hub": "2"}
    requirements = {"transformers": ["tokenizers", "huggingface-hub<2"]}
    kinds = [kind for kind, _ in summary(diagnose(versions, PY311, requirements))]
    assert kinds == ["missing", "clash", "warning", "note"]


def test_the_tables_are_well_formed() -> None:
    for line in LINES:
        for specifier in (line.python, *line.versions.values()):
            SpecifierSet(specifier)
        assert set(line.needs) <= line.versions.keys()
    for rule in RULES:
        for specifier in rule.when.values():
            SpecifierSet(specifier)


def test_reading_this_environment() -> None:
    versions, requirements = read_environment()
    for name in ("slimtron-common", "torch", "megatron-core", "pydantic", "pyyaml"):
        assert versions[name] == version(name)
    assert ("nemo-toolkit" in versions) is (find_spec("nemo") is not None)
    assert "gguf" not in {Requirement(text).name for text in requirements["slimtron-common"]}
    assert "torch" in {Requirement(text).name for text in requirements["slimtron-common"]}
    assert {Requirement(owner).name for owner in requirements} <= versions.keys()


GPU = Gpu(name="NVIDIA H100 80GB HBM3", capability="9.0", memory=80 * 2**30)


@pytest.mark.parametrize(
    ("devices", "found"),
    [
        (Devices(), None),
        (Devices(cuda="13.0"), None),
        (Devices(cuda="13.0", driver=True, gpus=(GPU,)), None),
        (Devices(driver=True), ("warning", "is a CPU build")),
        (Devices(cuda="13.0", driver=True), ("warning", "sees no GPU")),
        (Devices(error="libcudart.so.13"), ("clash", "cannot be imported: libcudart.so.13")),
    ],
)
def test_what_keeps_torch_from_the_gpus(devices: Devices, found: tuple[str, str] | None) -> None:
    findings = list(check_devices(devices, {}))
    if found is None:
        assert findings == []
    else:
        (finding,) = findings
        assert finding.kind == found[0]
        assert finding.message.startswith(found[1])


@pytest.mark.parametrize(
    ("cuda", "found"),
    [
        ("12.8", None),
        ("13.0", ("clash", "is built for CUDA 12, torch for CUDA 13.0")),
        (None, ("warning", "is for GPUs, torch is a CPU build")),
    ],
)
def test_transformer_engine_is_for_one_cuda(
    cuda: str | None, found: tuple[str, str] | None
) -> None:
    versions = {"transformer-engine": "2.8.0", "transformer-engine-cu12": "2.8.0"}
    findings = list(check_devices(Devices(cuda=cuda), versions))
    assert [(f.kind, f.message) for f in findings] == ([] if found is None else [found])
    if cuda == "13.0":
        assert findings[0].mend is not None
        assert "core_cu13" in findings[0].mend


def test_reading_the_devices_agrees_with_torch() -> None:
    import torch

    devices = read_devices()
    assert (devices.cuda, devices.error) == (torch.version.cuda, None)
    assert len(devices.gpus) == torch.cuda.device_count()
