from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimtron_common.checkpoint.safetensors_file import SafetensorsWriter

DTYPES = (
    torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16,
    torch.int16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def test_the_file_is_the_library_s(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.{name}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for i, dtype in enumerate(reversed(DTYPES))
        for name, shape in {"é": (3, 5), "empty": (0, 4), "number": ()}.items()
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with SafetensorsWriter(tmp_path / "ours") as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours").keys() == tensors.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in tuple"), SafetensorsWriter(tmp_path / "f") as file:
        file.add("x", torch.ones(3, dtype=torch.complex128))
    assert not list(tmp_path.iterdir())
