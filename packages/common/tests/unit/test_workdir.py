from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.workdir import WorkDir, check_resumable, work_path

IDENTITY: dict[str, Any] = {
    "config": {"algorithm": "fp8", "parallel": {"tensor_parallel_size": 1}, "layers": (1, 2)},
    "calibration": None,
}


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def changed(**config: Any) -> dict[str, Any]:
    return {**IDENTITY, "config": {**IDENTITY["config"], **config}}


def test_stages_are_kept_beside_the_output(output: Path, context: ParallelContext) -> None:
    work = WorkDir(output, IDENTITY, context, resume=False)
    assert work.path == work_path(output) == output.with_name("out.work")
    assert not work.has("first")
    with work.stage("first") as stage:
        (stage.directory / "scales").write_text("content")
        stage.result = {"loss": 0.1}
        assert not work.has("first")
    assert work.has("first")
    assert work.result("first") == {"loss": 0.1}
    assert (work.directory("first") / "scales").read_text() == "content"
    with work.stage("second"):
        pass
    assert work.has("second")
    with pytest.raises(CheckpointError, match="missing"):
        work.result("second")
    assert not output.exists()
    work.remove()
    assert not work.path.exists()


def test_resumed_work_has_its_stages(output: Path, context: ParallelContext) -> None:
    work = WorkDir(output, IDENTITY, context, resume=False)
    with work.stage("first") as stage:
        stage.result = {"loss": 0.1}
    check_resumable(output, IDENTITY, resume=True, overwrite=False)
    again = WorkDir(output, IDENTITY, context, resume=True)
    assert again.result("first") == {"loss": 0.1}
    assert not again.has("second")


def test_work_that_starts_again_has_none(output: Path, context: ParallelContext) -> None:
    with WorkDir(output, IDENTITY, context, resume=False).stage("first"):
        pass
    check_resumable(output, changed(algorithm="int8"), resume=False, overwrite=True)
    again = WorkDir(output, changed(algorithm="int8"), context, resume=False)
    assert not again.has("first")
    # And is the one that can be gone on with from now on.
    check_resumable(output, changed(algorithm="int8"), resume=True, overwrite=False)


def test_unfinished_work_is_not_lost_by_accident(output: Path, context: ParallelContext) -> None:
    check_resumable(output, IDENTITY, resume=False, overwrite=False)
    check_resumable(output, IDENTITY, resume=True, overwrite=False)
    WorkDir(output, IDENTITY, context, resume=False)
    with pytest.raises(CheckpointError, match="unfinished") as caught:
        check_resumable(output, IDENTITY, resume=False, overwrite=False)
    assert "--resume" in str(caught.value.hint)
    assert "--overwrite" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("identity", "found"),
    [
        (changed(algorithm="int8"), "config.algorithm was 'fp8' and is now 'int8'"),
        (
            changed(parallel={"tensor_parallel_size": 2}),
            "config.parallel.tensor_parallel_size was 1 and is now 2",
        ),
        (changed(layers=[1, 3]), "config.layers was [1, 2] and is now [1, 3]"),
        (changed(seed=3), "config.seed was None and is now 3"),
        (
            {"config": IDENTITY["config"], "calibration": "ab"},
            "calibration was None and is now 'ab'",
        ),
        ({"config": IDENTITY["config"]} | {"config": 3}, "is now 3"),
    ],
)
def test_other_work_is_refused_with_what_changed(
    identity: dict[str, Any], found: str, output: Path, context: ParallelContext
) -> None:
    WorkDir(output, IDENTITY, context, resume=False)
    with pytest.raises(ConfigError, match="other settings") as caught:
        check_resumable(output, identity, resume=True, overwrite=False)
    assert found in str(caught.value.found)
    # --overwrite with --resume does not give up the check.
    with pytest.raises(ConfigError):
        check_resumable(output, identity, resume=True, overwrite=True)


def test_every_change_is_named(output: Path, context: ParallelContext) -> None:
    WorkDir(output, IDENTITY, context, resume=False)
    identity = {**changed(algorithm="int8", seed=1), "calibration": "ab"}
    with pytest.raises(ConfigError) as caught:
        check_resumable(output, identity, resume=True, overwrite=False)
    names = [part.split()[0] for part in str(caught.value.found).split("; ")]
    assert names == ["calibration", "config.algorithm", "config.seed"]


def test_failed_stage_leaves_nothing(output: Path, context: ParallelContext) -> None:
    work = WorkDir(output, IDENTITY, context, resume=False)

    def fail() -> None:
        with work.stage("first") as stage:
            (stage.directory / "half").touch()
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fail()
    assert not work.has("first")
    assert [file.name for file in work.path.iterdir()] == ["identity.json"]


def test_damaged_identity_is_refused(output: Path, context: ParallelContext) -> None:
    work = WorkDir(output, IDENTITY, context, resume=False)
    (work.path / "identity.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"identity\.json"):
        check_resumable(output, IDENTITY, resume=True, overwrite=False)


@pytest.mark.parametrize(("resume", "overwrite"), [(True, False), (False, True), (False, False)])
def test_somebody_elses_directory_is_refused(
    resume: bool, overwrite: bool, output: Path, context: ParallelContext
) -> None:
    path = work_path(output)
    path.mkdir()
    check_resumable(output, IDENTITY, resume=resume, overwrite=overwrite)
    (path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="no run left it") as caught:
        check_resumable(output, IDENTITY, resume=resume, overwrite=overwrite)
    assert "another output" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="no run left it"):
        WorkDir(output, IDENTITY, context, resume=resume)
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("exists", [False, True])
def test_start_that_fails_leaves_no_half_run(
    exists: bool, output: Path, context: ParallelContext
) -> None:
    if exists:
        WorkDir(output, IDENTITY, context, resume=False)
    with pytest.raises(TypeError, match="JSON"):
        WorkDir(output, {"config": object()}, context, resume=False)
    assert list(output.parent.iterdir()) == []
    check_resumable(output, IDENTITY, resume=True, overwrite=False)
    WorkDir(output, IDENTITY, context, resume=True)


def test_run_with_damaged_identity_starts_again(output: Path, context: ParallelContext) -> None:
    (WorkDir(output, IDENTITY, context, resume=False).path / "identity.json").write_text("{")
    check_resumable(output, IDENTITY, resume=False, overwrite=True)
    WorkDir(output, IDENTITY, context, resume=False)
    check_resumable(output, IDENTITY, resume=True, overwrite=False)


def test_killed_stage_leaves_nothing_that_counts(output: Path, context: ParallelContext) -> None:
    script = textwrap.dedent(
        """
        import json, os, signal, sys
        from pathlib import Path
        from slimtron_common.parallel import initialize_parallel
        from slimtron_common.workdir import WorkDir

        output, identity = Path(sys.argv[1]), json.loads(sys.argv[2])
        with initialize_parallel(device="cpu") as context:
            work = WorkDir(output, identity, context, resume=False)
            with work.stage("first") as stage:
                stage.result = {"loss": 0.1}
            with work.stage("second") as stage:
                (stage.directory / "half").write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(output), json.dumps(IDENTITY)],
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    check_resumable(output, IDENTITY, resume=True, overwrite=False)
    work = WorkDir(output, IDENTITY, context, resume=True)
    assert work.result("first") == {"loss": 0.1}
    assert not work.has("second")
    with work.stage("second") as stage:
        assert list(stage.directory.iterdir()) == []
    names = sorted(file.name for file in work.path.iterdir())
    assert names == ["first", "identity.json", "second"]
