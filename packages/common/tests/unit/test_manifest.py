from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from slimtron_common.errors import CheckpointError
from slimtron_common.manifest import (
    environment_versions,
    read_manifest,
    verify_manifest,
    write_manifest,
)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    (directory / "deep").mkdir(parents=True)
    (directory / "weights.bin").write_bytes(bytes(range(256)) * 8192)
    (directory / "deep" / "slimtron.json").write_text("inner")
    (directory / "empty").touch()
    write(directory)
    return directory


def write(directory: Path) -> None:
    write_manifest(
        directory,
        kind="quantized-checkpoint",
        config={"recipe": "fp8", "alpha": 0.1},
        metrics={"perplexity": 17.713, "kl": float("inf"), "none": None},
        seed=1234,
    )


def test_it_records_what_was_given_and_every_file(output: Path) -> None:
    manifest = verify_manifest(output)
    assert manifest == read_manifest(output)
    assert (manifest.kind, manifest.seed) == ("quantized-checkpoint", 1234)
    assert manifest.config == {"recipe": "fp8", "alpha": 0.1}
    assert manifest.metrics == {"perplexity": 17.713, "kl": "Infinity", "none": None}
    assert manifest.versions == environment_versions()
    assert {name: record.bytes for name, record in manifest.files.items()} == {
        "deep/slimtron.json": 5,
        "empty": 0,
        "weights.bin": 2**21,
    }
    expected = hashlib.sha256((output / "weights.bin").read_bytes()).hexdigest()
    assert manifest.files["weights.bin"].sha256 == expected


def test_writing_again_changes_no_byte(output: Path) -> None:
    before = (output / "slimtron.json").read_bytes()
    write(output)
    assert (output / "slimtron.json").read_bytes() == before
    assert json.loads(before)["format"] == 1


def test_what_a_killed_writer_left_is_removed_and_not_listed(output: Path) -> None:
    before = (output / "slimtron.json").read_bytes()
    program = """
import os, signal, sys
from pathlib import Path
from slimtron_common import atomic

os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
atomic.atomic_write(Path(sys.argv[1]) / "slimtron.json", "half")
"""
    child = subprocess.run([sys.executable, "-c", program, str(output)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(list(output.glob(".slimtron.json.tmp-*"))) == 1
    write(output)
    verify_manifest(output)
    assert (output / "slimtron.json").read_bytes() == before


def _flip_a_bit(output: Path) -> None:
    data = bytearray((output / "weights.bin").read_bytes())
    data[-1] ^= 1
    (output / "weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "weights.bin").unlink(), "weights.bin: is missing"),
        (lambda d: (d / "deep" / "more").touch(), "deep/more: is not in the manifest"),
        (lambda d: (d / "empty").write_text("x"), "empty: has changed\n  found: 1 B"),
        (_flip_a_bit, "weights.bin: has changed\n  found: SHA-256"),
    ],
)
def test_a_damaged_output_is_refused(
    output: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(output)
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(output)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-10], "is not JSON"),
        (lambda text: "[]", "is not JSON"),
        (lambda text: text.replace('"kind"', '"kin"'), "is not a manifest: kind"),
        (lambda text: text.replace('"bytes": 5', '"bytes": "5"'), "slimtron.json.bytes"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "another format\n  found: 2"),
    ],
)
def test_a_damaged_manifest_is_refused(
    output: Path, edit: Callable[[str], str], message: str
) -> None:
    file = output / "slimtron.json"
    file.write_text(edit(file.read_text()))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(output)
    assert message in str(caught.value)


def test_names_that_lead_outside_are_never_opened(output: Path) -> None:
    file = output / "slimtron.json"
    file.write_text(file.read_text().replace('"empty"', '"../../empty"'))
    with pytest.raises(CheckpointError, match="is missing"):
        verify_manifest(output)


def test_a_directory_without_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


def test_environment_versions_are_those_installed() -> None:
    versions = environment_versions()
    assert versions["python"] == platform.python_version()
    for name in ("torch", "megatron-core", "slimtron-common"):
        assert versions[name] == version(name)
    assert "not-installed" not in versions
