"""Quantizers that somebody else wrote."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimtron_common.errors import CheckpointError
from slimtron_common.integrations.modelopt_state import STATE_DIR, _decoded, restore_quantizers


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_settings_as_older_modelopts_pickle_them(tmp_path: Path) -> None:
    settings = {"modelopt_quantizer_state": {"size": torch.Size([2]), "dtype": torch.bfloat16}}
    assert _decoded(pickle.dumps(settings)) == settings
    scales = torch.arange(3.0)
    assert torch.equal(_decoded(pickle.dumps({"scales": scales}))["scales"], scales)
    trap = tmp_path / "trap"
    # In the settings themselves, and in what torch pickles inside of a pickle.
    inside = torch.storage._load_from_bytes, (pickle.dumps(Hostile(trap)),)
    nested = type("Nested", (), {"__reduce__": lambda self: inside})
    nested.__module__, globals()["Nested"] = __name__, nested
    for hostile in (Hostile(trap), nested()):
        with pytest.raises(pickle.UnpicklingError):
            _decoded(pickle.dumps({"modelopt_quantizer_state": hostile}))
    assert not trap.exists()


def test_another_generation_is_refused(tmp_path: Path) -> None:
    modelopt = pytest.importorskip("modelopt")
    other = "0.37.0" if modelopt.__version__ >= "0.44" else "0.47.0"
    (tmp_path / STATE_DIR).mkdir()
    torch.save({"modelopt_version": other}, tmp_path / STATE_DIR / "common.pt")
    with pytest.raises(CheckpointError, match=f"another generation.*\\n.*{other}"):
        restore_quantizers(nn.Linear(1, 1), tmp_path)
