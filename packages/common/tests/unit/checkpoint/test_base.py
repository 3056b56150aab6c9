from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint, parse_spec
from slimtron_common.checkpoint.base import has_tokenizer, load_tokenizer, read_json
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.testing import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dtype="bfloat16")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_spec_is_split_at_the_first_colon() -> None:
    assert parse_spec("hf:a:b") == ("hf", Path("a:b"))
    assert parse_spec("megatron:~/x") == ("megatron", Path.home() / "x")


@pytest.mark.parametrize("spec", ["", "model", "hf:", ":model", "nemo:model", "HF:model"])
def test_malformed_spec_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="kind") as caught:
        parse_spec(spec, where="--against")
    assert caught.value.where == "--against"
    assert "hf:DIR" in str(caught.value.allowed)


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_missing_directory_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(f"{kind}:{tmp_path / 'nothing'}")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="a file"):
        open_checkpoint(f"{kind}:{file}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "JSON object"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_malformed_json_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(file)
    assert caught.value.where == file


def test_dtype_is_that_of_the_config(copy: Path) -> None:
    assert open_checkpoint(f"hf:{copy}").dtype is torch.bfloat16
    config = json.loads((copy / "config.json").read_text())
    config.pop("torch_dtype", None)
    for name in ("int8", "float7", "Tensor", "nn"):
        (copy / "config.json").write_text(json.dumps({**config, "dtype": name}))
        with pytest.raises(CheckpointError, match="type of the weights"):
            _ = open_checkpoint(f"hf:{copy}").dtype


def test_automatic_dtype_is_exact_on_the_cpu_and_as_stored_on_a_gpu(tiny: Path) -> None:
    checkpoint = open_checkpoint(f"hf:{tiny}")
    assert checkpoint.compute_dtype("auto", "cpu") is torch.float32
    assert checkpoint.compute_dtype("auto", "cuda") is torch.bfloat16
    assert checkpoint.compute_dtype("float16", "cpu") is torch.float16


def test_tokenizer_is_read_from_the_directory(tiny: Path) -> None:
    tokenizer = open_checkpoint(f"hf:{tiny}").tokenizer()
    text = "The import statement"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_absent_and_damaged_tokenizers_are_refused(copy: Path) -> None:
    assert has_tokenizer(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    assert not has_tokenizer(copy)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(copy)


def test_tokenizer_of_a_larger_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    small = write_tiny_model(tmp_path / "small", vocab_size=280, tokenizer=False)
    shutil.copy(tiny / "tokenizer.json", small)
    shutil.copy(tiny / "tokenizer_config.json", small)
    with pytest.raises(CheckpointError, match="more tokens than the model") as caught:
        open_checkpoint(f"hf:{small}").tokenizer()
    assert caught.value.found == "300 tokens, 280 embeddings"


def test_companions_are_the_files_beside_the_weights(tiny: Path) -> None:
    names = {file.name for file in open_checkpoint(f"hf:{tiny}").companion_files()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert not names & {"config.json", "model.safetensors"}


def test_another_weight_is_another_model(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=1, tokenizer=False)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    before = open_checkpoint(f"hf:{model}").identity
    assert open_checkpoint(f"hf:{copy}").identity == before
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    changed = open_checkpoint(f"hf:{copy}").identity
    assert changed != before
    assert changed["parameters"] == before["parameters"]
