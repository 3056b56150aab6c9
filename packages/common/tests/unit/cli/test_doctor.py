from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from slimtron_common.cli import run_command


def doctor(*argv: str) -> int:
    names = ["doctor"]
    return run_command(
        "slimtron-common", "", "slimtron_common.cli", names, ["doctor", *argv], version=""
    )


def test_text_names_versions_line_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor()
    out = capsys.readouterr().out
    assert version("megatron-core") in out
    assert "Line: " in out
    verdict = {0: "can run Slimtron", 2: "cannot run Slimtron as it is"}
    assert verdict[code] in out


def test_json_agrees_with_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor("--json")
    report = json.loads(capsys.readouterr().out)
    assert report["can_run"] is (code == 0)
    assert report["versions"]["torch"] == version("torch")
    assert set(report["devices"]) == {"cuda", "gpus", "driver", "error"}
    assert all(set(f) == {"kind", "subject", "message", "mend"} for f in report["findings"])
    assert report["extras"]["transformer-engine"]["install"].startswith("pip install")
