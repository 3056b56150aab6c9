"""Records what a session of the noxfile ran, and writes the table of docs/compatibility.md.

    python docs/compatibility.py record "lines(nemo, cpu)" JUNIT_XML PYTEST_ARGUMENTS...
    python docs/compatibility.py table [--check]

A record is one file in docs/compatibility/; the noxfile writes it in the session's environment.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DOCS = Path(__file__).parent
RECORDS = DOCS / "compatibility"
PAGE = DOCS / "compatibility.md"
BEGIN, END = "<!-- table of sessions: docs/compatibility.py -->", "<!-- end -->"

LIBRARIES = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "nemo-toolkit", "numpy")
RESULTS = ("tests", "passed", "failed", "skipped", "minutes")
SESSIONS = (
    *(
        f"lines({line}, {cuda})"
        for line in ("mcore016", "mcore019", "nemo")
        for cuda in ("cpu", "cu128", "cu130")
    ),
    "minimums",
)


def record(session: str, junit: Path, arguments: list[str]) -> None:
    """Writes what pytest reported, with the versions of the environment that this runs in."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    seconds = 0.0
    for suite in suites:
        seconds += float(suite.get("time", "0"))
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    failed = counts["failures"] + counts["errors"]
    entry = {
        "session": session,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "arguments": arguments,
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "minutes": round(seconds / 60, 1),
    }
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(entry, indent=2) + "\n"
    (RECORDS / f"{_slug(session)}.json").write_text(text, encoding="utf-8")


def table() -> str:
    """Returns the page as the records make it."""
    header = ("session", "date", "machine", "Python", *LIBRARIES, *RESULTS)
    rows = [header, ("---",) * len(header), *(_row(session) for session in SESSIONS)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + "\n".join((BEGIN, *lines, END)) + after


def _row(session: str) -> tuple[str, ...]:
    path = RECORDS / f"{_slug(session)}.json"
    if not path.exists():
        return (f"`{session}`", "not run", *[""] * (len(LIBRARIES) + len(RESULTS) + 2))
    entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    entry["tests"] = f"[some]({RECORDS.name}/{path.name})" if entry["arguments"] else "all"
    return (
        f"`{session}`",
        entry["date"],
        entry["machine"],
        entry["python"],
        *(entry["versions"].get(name, "none") for name in LIBRARIES),
        *(str(entry[name]) for name in RESULTS),
    )


def _slug(session: str) -> str:
    return session.replace("(", "-").replace(", ", "-").rstrip(")")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("session", choices=SESSIONS)
    recording.add_argument("junit", type=Path)
    recording.add_argument("arguments", nargs=argparse.REMAINDER)
    commands.add_parser("table").add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.command == "record":
        record(args.session, args.junit, args.arguments)
        return 0
    text = table()
    if args.check:
        if text != PAGE.read_text(encoding="utf-8"):
            print(f"{PAGE} is stale: python docs/compatibility.py table", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
