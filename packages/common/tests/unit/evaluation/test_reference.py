from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from slimtron_common.errors import CheckpointError
from slimtron_common.evaluation.reference import (
    ReferenceReader,
    ReferenceWriter,
    reference_bytes,
)

KEY = "tp0-dp1"


def record(directory: Path, batches: Iterable[torch.Tensor]) -> None:
    with ReferenceWriter(directory, KEY) as writer:
        for batch in batches:
            writer.append(batch)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 5, generator=generator).bfloat16() for size in (2, 2, 1)]


@pytest.fixture
def recording(tmp_path: Path, batches: list[torch.Tensor]) -> Path:
    record(tmp_path / "logits", batches)
    return tmp_path / "logits"


def test_reads_back_what_was_recorded(recording: Path, batches: list[torch.Tensor]) -> None:
    reader = ReferenceReader(recording, KEY)
    assert len(reader) == 3
    for _ in range(2):
        for actual, expected in zip(reader, batches, strict=True):
            assert actual.dtype == torch.bfloat16
            assert torch.equal(actual, expected)
    assert torch.equal(reader.read(2, like=batches[2]), batches[2])
    size = sum(reference_bytes(b.shape[0] * 3, 5, torch.bfloat16) for b in batches)
    assert (recording / f"{KEY}.logits").stat().st_size == size


def test_keeps_every_bit_and_any_layout(tmp_path: Path) -> None:
    special = torch.tensor([[[torch.nan, torch.inf, -torch.inf, -0.0, 1e-45]]])
    transposed = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4).transpose(0, 1)
    needs_grad = torch.ones(1, 1, 2, requires_grad=True)
    empty = torch.empty(0, 3, 5, dtype=torch.float16)
    originals = [special, transposed, needs_grad, empty]
    record(tmp_path, originals)
    for actual, expected in zip(ReferenceReader(tmp_path, KEY), originals, strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0, equal_nan=True)


def test_interrupted_recording_is_not_taken_for_whole(
    recording: Path, batches: list[torch.Tensor]
) -> None:
    # The second recording must not leave the first one's description behind either.
    def interrupted() -> Iterator[torch.Tensor]:
        yield batches[0]
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        record(recording, interrupted())
    assert list(recording.iterdir()) == []
    with pytest.raises(CheckpointError, match="no finished recording"):
        ReferenceReader(recording, KEY)


def test_killed_recording_is_not_taken_for_whole(
    tmp_path: Path, batches: list[torch.Tensor]
) -> None:
    writer = ReferenceWriter(tmp_path, KEY).__enter__()
    writer.append(batches[0])
    with pytest.raises(CheckpointError, match="no finished recording"):
        ReferenceReader(tmp_path, KEY)
    writer.__exit__(None, None, None)
    assert len(ReferenceReader(tmp_path, KEY)) == 1


def test_truncated_data_is_refused(recording: Path) -> None:
    data = recording / f"{KEY}.logits"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        ReferenceReader(recording, KEY)
    assert caught.value.found == "149 bytes"
    assert caught.value.allowed == "150 bytes"


def test_missing_data_is_refused(recording: Path) -> None:
    (recording / f"{KEY}.logits").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ReferenceReader(recording, KEY)


def test_changed_data_is_refused(recording: Path, batches: list[torch.Tensor]) -> None:
    data = recording / f"{KEY}.logits"
    raw = bytearray(data.read_bytes())
    raw[70] ^= 1
    data.write_bytes(raw)
    reader = ReferenceReader(recording, KEY)
    assert torch.equal(reader.read(0), batches[0])
    with pytest.raises(CheckpointError, match="batch 1 is corrupt"):
        reader.read(1)


def test_data_cut_while_reading_is_refused(recording: Path) -> None:
    reader = ReferenceReader(recording, KEY)
    (recording / f"{KEY}.logits").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="batch 0 is corrupt"):
        reader.read(0)


def test_other_shape_or_more_batches_are_refused(recording: Path) -> None:
    reader = ReferenceReader(recording, KEY)
    with pytest.raises(CheckpointError, match="batch 0 was recorded in another shape") as caught:
        reader.read(0, like=torch.empty(2, 3, 10))
    assert caught.value.found == (2, 3, 5)
    with pytest.raises(CheckpointError, match="fewer batches"):
        reader.read(3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"batches": 3}',
        '{"batches": [{"shape": [2], "crc32": 0}]}',
        '{"batches": [{"dtype": "float99", "shape": [2], "crc32": 0}]}',
        '{"batches": [{"dtype": "nn", "shape": [2], "crc32": 0}]}',
        '{"batches": [{"dtype": "float32", "shape": ["2"], "crc32": 0}]}',
    ],
)
def test_broken_description_is_refused(recording: Path, text: str) -> None:
    (recording / f"{KEY}.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{KEY}.json"):
        ReferenceReader(recording, KEY)


def test_wrong_sizes_in_the_description_are_refused(recording: Path) -> None:
    index = recording / f"{KEY}.json"
    description = json.loads(index.read_text())
    description["batches"][0]["shape"] = [1, 3, 5]
    index.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="truncated or changed"):
        ReferenceReader(recording, KEY)


def test_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot be recorded"),
        ReferenceWriter(tmp_path / "file", KEY),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is full")
def test_full_disk_is_reported(tmp_path: Path) -> None:
    (tmp_path / f"{KEY}.logits").symlink_to("/dev/full")
    with (
        pytest.raises(CheckpointError, match="No space left"),
        ReferenceWriter(tmp_path, KEY) as writer,
    ):
        writer.append(torch.zeros(8, 1024, 16))
    assert not (tmp_path / f"{KEY}.json").exists()
