"""Whether two models speak of the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.errors import ConfigError
from slimtron_common.testing import write_tiny_model
from slimtron_distill.vocabulary import shared_vocab_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", num_hidden_layers=1)
    write_tiny_model(folder / "padded", num_hidden_layers=1, vocab_size=320, tokenizer=False)
    write_tiny_model(folder / "bare", num_hidden_layers=1, tokenizer=False)
    shutil.copytree(folder / "padded", folder / "related")
    shutil.copytree(folder / "student", folder / "stranger")
    shutil.copy(folder / "student/tokenizer.json", folder / "related")
    shutil.copy(folder / "student/tokenizer_config.json", folder / "related")
    path = folder / "stranger/tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def _shared(folder: Path, student: str, teacher: str) -> int:
    return shared_vocab_size(*(open_checkpoint(f"hf:{folder / x}") for x in (student, teacher)))


def test_one_tokenizer_may_be_padded_to_two_sizes(folder: Path) -> None:
    assert _shared(folder, "student", "related") == 300
    assert _shared(folder, "related", "student") == 300


def test_without_a_tokenizer_the_sizes_must_agree(folder: Path) -> None:
    assert _shared(folder, "student", "bare") == 300
    with pytest.raises(ConfigError, match="differ in vocabulary") as error:
        _shared(folder, "student", "padded")
    assert "320 entries, the student's 300" in str(error.value)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="differ in vocabulary") as error:
        _shared(folder, "student", "stranger")
    assert "token 298" in str(error.value)
