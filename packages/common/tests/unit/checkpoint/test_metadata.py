from __future__ import annotations

import os
import pathlib
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from slimtron_common.checkpoint.metadata import StoredTensor, check_metadata, refuse_code
from slimtron_common.errors import CheckpointError


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.function, self.args)


def write(directory: Path, content: object) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(content))


def test_index_that_torch_writes_is_accepted(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.zeros(2, 3, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    }
    dcp.save({**tensors, "step": 3}, checkpoint_id=tmp_path, no_dist=True)
    check_metadata(tmp_path)


def test_index_of_python_3_13_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that paths are of ``pathlib._local``."""
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    old = pickle.dumps(index, protocol=2)
    new = old.replace(b"cpathlib\n", b"cpathlib._local\n")
    assert b"cpathlib._local\n" in new
    (tmp_path / ".metadata").write_bytes(new)
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    assert check_metadata(tmp_path) == {"a": StoredTensor((2,), torch.float32)}


@pytest.mark.parametrize(
    "function",
    [
        os.system,
        eval,
        getattr,
        __import__,
        shutil.rmtree,
        Path.touch,
        torch.load,
    ],
    ids=lambda f: f.__qualname__,
)
def test_index_that_calls_a_function_is_refused(function: Any, tmp_path: Path) -> None:
    write(tmp_path, {"a": Call(function, "x")})
    with pytest.raises(CheckpointError, match="would run code") as caught:
        check_metadata(tmp_path)
    assert function.__name__ in str(caught.value.found)


def test_refused_index_has_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write(tmp_path, [torch.Size([1]), Call(os.mkdir, str(trace))])
    with pytest.raises(CheckpointError, match="would run code"):
        check_metadata(tmp_path)
    assert not trace.exists()
    # The attack is a real one.
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(
    "name", ["float32.__reduce_ex__", "float_power.__self__", "int_repr", "serialization.os.system"]
)
def test_attributes_of_what_is_allowed_are_refused(name: str, tmp_path: Path) -> None:
    # Protocol 4 looks dotted names up attribute by attribute.
    text = name.encode()
    content = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(text)]) + text + b"\x93."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="would run code"):
        check_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", pickle.dumps([1] * 99)[:-5]])
def test_corrupt_index_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="corrupt"):
        check_metadata(tmp_path)


def test_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        check_metadata(tmp_path)


def test_code_is_refused_even_where_the_caller_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, file = tmp_path / "trace", tmp_path / "object.pt"
    torch.save(Call(os.mkdir, str(trace)), file)
    # The user's permission for other files does not count here, and is there again afterwards.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    before = dict(os.environ)
    with refuse_code(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not trace.exists()
    assert dict(os.environ) == before
    torch.load(file, weights_only=False)
    assert trace.exists()


def test_environment_is_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    with pytest.raises(ZeroDivisionError), refuse_code():
        raise ZeroDivisionError
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"
