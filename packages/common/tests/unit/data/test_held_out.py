from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimtron_common.checkpoint.base import load_tokenizer
from slimtron_common.data import DataConfig, held_out_datasets, token_dataset
from slimtron_common.errors import ConfigError
from slimtron_common.testing import write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


EVALUATION = DataConfig(source="pydoc", num_tokens=96, seq_length=32)


def test_one_source_is_one_stream(tokenizer: Any) -> None:
    work = replace(EVALUATION, num_tokens=64, seq_length=16)
    held_out, rest = held_out_datasets(EVALUATION, work, tokenizer)
    assert (held_out.tokens.shape, rest.tokens.shape) == ((3, 32), (4, 16))
    stream = token_dataset(replace(EVALUATION, num_tokens=160, seq_length=160), tokenizer)
    both = np.concatenate([held_out.tokens.ravel(), rest.tokens.ravel()])
    assert np.array_equal(both, stream.tokens.ravel())


def test_two_sources_are_read_each_from_its_beginning(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Some words to work with. " * 40)
    work = replace(EVALUATION, source=str(file), num_tokens=64)
    held_out, rest = held_out_datasets(EVALUATION, work, tokenizer)
    assert held_out.fingerprint == token_dataset(EVALUATION, tokenizer).fingerprint
    assert rest.fingerprint == token_dataset(work, tokenizer).fingerprint
    both = replace(EVALUATION, source=str(file))
    with pytest.raises(ConfigError, match="fewer tokens"):
        held_out_datasets(both, replace(work, num_tokens=32 * 100), tokenizer)
