from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slimtron_common.checkpoint.writer import (
    INDEX_NAME,
    collective_directory,
    copy_files,
    write_safetensors,
)
from slimtron_common.errors import CheckpointError
from slimtron_common.parallel import ParallelContext

Named = list[tuple[str, torch.Tensor]]


def tensors(count: int = 5) -> Named:
    generator = torch.Generator().manual_seed(0)
    return [(f"t{i}", torch.randn(10, 10, generator=generator)) for i in range(count)]


def test_directory_appears_when_the_block_ends(tmp_path: Path, context: ParallelContext) -> None:
    target = tmp_path / "out"
    with collective_directory(target, context) as directory:
        (directory / "file").write_text("content")
        assert directory.parent == target.parent
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [target]


def test_error_leaves_nothing(tmp_path: Path, context: ParallelContext) -> None:
    def interrupted() -> None:
        with collective_directory(tmp_path / "out", context) as directory:
            (directory / "file").touch()
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_error_leaves_the_old_directory(tmp_path: Path, context: ParallelContext) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "slimtron.json").touch()
    with (
        pytest.raises(CheckpointError, match="exists already"),
        collective_directory(target, context),
    ):
        pytest.fail("the block must not start")
    with pytest.raises(RuntimeError), collective_directory(target, context, overwrite=True):
        raise RuntimeError
    assert [file.name for file in target.iterdir()] == ["slimtron.json"]
    with collective_directory(target, context, overwrite=True) as directory:
        (directory / "new").touch()
    assert [file.name for file in target.iterdir()] == ["new"]


def test_one_file_needs_no_index(tmp_path: Path, context: ParallelContext) -> None:
    write_safetensors(tmp_path, tensors(), context)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        # transformers 4 refuses files that do not say so.
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("limit", "files"), [(2000, 1), (800, 3), (799, 5), (1, 5)])
def test_files_are_bounded(
    limit: int, files: int, tmp_path: Path, context: ParallelContext
) -> None:
    write_safetensors(tmp_path, tensors(), context, max_shard_bytes=limit)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == files
    found = {}
    for file in written:
        content = load_file(file)
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= limit
        found.update(content)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors())
    index = tmp_path / INDEX_NAME
    assert index.exists() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == 5 * 400
        assert all(
            name in load_file(tmp_path / file) for name, file in content["weight_map"].items()
        )
        assert [f.name for f in written] == [
            f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)
        ]


def test_tensors_are_streamed(tmp_path: Path, context: ParallelContext) -> None:
    """When a tensor is asked for, all but the last file's are on the disk."""
    asked = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal asked
        for name, tensor in tensors(9):
            parts = [file for file in tmp_path.iterdir() if file.is_file()]
            assert len(parts) >= (asked - 1) // 2
            asked += 1
            yield name, tensor

    write_safetensors(tmp_path, stream(), context, max_shard_bytes=800)
    assert asked == 9


def test_views_and_gradients_are_written_by_value(tmp_path: Path, context: ParallelContext) -> None:
    whole = torch.arange(24.0).view(4, 6)
    named = [
        ("rows", whole[:2]),
        ("other rows", whole[2:]),
        ("transposed", whole.t()),
        ("gradient", torch.ones(2, requires_grad=True)),
    ]
    write_safetensors(tmp_path, named, context)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in named)


def test_others_may_read_the_files(tmp_path: Path, context: ParallelContext) -> None:
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path, tensors(), context)
    finally:
        os.umask(before)
    mode = (tmp_path / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o644


def test_files_are_copied_by_name(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").write_bytes(b"\x00\xff")
    copy_files([source / "tokenizer.json"], target)
    assert (target / "tokenizer.json").read_bytes() == b"\x00\xff"
