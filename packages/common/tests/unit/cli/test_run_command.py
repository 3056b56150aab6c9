from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import slimtron_common.cli
from slimtron_common.cli import run_command

HEAVY = {"torch", "yaml", "rich", "transformers", "pydantic", "numpy"}

MODULE = '''
import argparse, logging

from slimtron_common.errors import ConfigError

HELP = "does the work"
EPILOG = """Examples:
  tool do-work --fail no
"""

def register(parser):
    parser.add_argument("--fail", default="no")

def execute(args):
    logging.getLogger("slimtron_tool").info("working")
    if args.fail == "config":
        raise ConfigError("is odd", where="a.b", found=3, allowed="even")
    if args.fail == "bug":
        raise ZeroDivisionError("by zero")
    if args.fail == "interrupt":
        raise KeyboardInterrupt
    print("result")
    return 3
'''


@pytest.fixture(autouse=True)
def _tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tool_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "do_work.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def run(*argv: str) -> int:
    return run_command("tool", "A tool.", "tool_package", ["do_work"], argv, version="1.2")


def test_results_go_to_stdout_and_logs_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("do-work") == 3
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert captured.err.endswith("INFO working\n")
    assert run("do-work", "-q") == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fail", "code", "last"),
    [
        ("config", 2, "tool do-work: a.b: is odd\n  found: 3\n  allowed: even\n"),
        ("interrupt", 130, "tool do-work: interrupted\n"),
        ("bug", 1, "tool do-work: failed: ZeroDivisionError: by zero\n"),
    ],
)
def test_errors_become_text_and_exit_codes(
    fail: str, code: int, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("do-work", "--fail", fail, "-q") == code
    err = capsys.readouterr().err
    assert err.endswith(last)
    assert ("Traceback" in err) is (fail == "bug")


def test_one_rank_of_many_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("do-work", "--fail", "config") == 2
    assert capsys.readouterr().err.startswith("[rank 1] tool do-work: a.b: is odd")


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (["--version"], 0, "tool 1.2"),
        (["--help"], 0, "do-work"),
        (["do-work", "--help"], 0, "Examples:\n  tool do-work --fail no\n"),
        ([], 2, "required: COMMAND"),
        (["do-work", "--fai", "no"], 2, "unrecognized arguments: --fai"),
    ],
)
def test_what_argparse_answers(
    argv: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert expected in captured.out + captured.err


def _subcommands() -> list[str]:
    folder = Path(slimtron_common.cli.__file__).parent
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("argv", [[], *([name.replace("_", "-")] for name in _subcommands())])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from slimtron_common.cli import run_command
        names, argv = {_subcommands()!r}, {[*argv, "--help"]!r}
        try:
            run_command("slimtron-common", "", "slimtron_common.cli", names, argv, version="")
        except SystemExit as end:
            assert end.code == 0
        print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
        """
    )
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert child.stdout.startswith("usage: slimtron-common")
    assert child.stderr == "[]\n"
