from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_distill.cache.store import TeacherCache, cache_identity

NUM_SEQUENCES, LENGTH, TOP_K = 300, 4, 3


def _identity(text: str = "abc") -> dict[str, object]:
    return cache_identity(
        teacher={"name": "large"},
        text=text,
        held_out="def",
        num_sequences=NUM_SEQUENCES,
        seq_length=LENGTH,
        vocab_size=50,
        top_k=TOP_K,
    )


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SEQUENCES, LENGTH, TOP_K)
    indices = torch.randint(50, shape, generator=generator)
    logits = torch.randn(shape, generator=generator).bfloat16()
    cache = TeacherCache.create(tmp_path / "cache", _identity())
    assert cache.missing() == [0, 1]
    for shard in (1, 0):
        rows = cache.rows(shard)
        cache.write(shard, indices[rows], logits[rows])
    return tmp_path / "cache", indices, logits


def test_what_is_written_is_read_in_any_order(
    filled: tuple[Path, torch.Tensor, torch.Tensor],
) -> None:
    directory, indices, logits = filled
    cache = TeacherCache(directory)
    cache.check(_identity())
    assert cache.missing() == []
    cache.verify()
    rows = torch.tensor([299, 0, 256, 255])
    found = cache.read(rows)
    assert found[0].dtype == torch.int64
    assert torch.equal(found[0], indices[rows])
    assert torch.equal(found[1], logits[rows])


def test_an_unfinished_shard_is_missing_and_a_changed_one_is_refused(
    filled: tuple[Path, torch.Tensor, torch.Tensor],
) -> None:
    directory, *_ = filled
    data = directory / "shard-00001.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        TeacherCache(directory).verify()
    assert "shard-00001" in str(caught.value)
    (directory / "shard-00001.json").unlink()
    assert TeacherCache(directory).missing() == [1]


def test_a_cache_of_other_text_is_refused(
    filled: tuple[Path, torch.Tensor, torch.Tensor],
) -> None:
    with pytest.raises(ConfigError, match="something else") as caught:
        TeacherCache(filled[0]).check(_identity(text="other"))
    assert "text abc" in str(caught.value)
    assert "text other" in str(caught.value)
