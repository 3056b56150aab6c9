from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from slimtron_common.testing import write_tiny_model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_are_small_real_and_repeatable(family: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    paths = [
        write_tiny_model(tmp_path / name, family, tokenizer=False, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (load_file(path / "model.safetensors") for path in paths)
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    # Nothing is all ones or zeros, where a mix-up would not show.
    assert all(tensor.std() > 0.01 for tensor in a.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[0])
    assert model.config.model_type == family
    assert 1e5 < model.num_parameters() < 4e5


def test_config_and_type_can_be_chosen(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "a", dtype="bfloat16", tokenizer=False, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("layers.1." in name for name in tensors)


def test_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == 300
    text = "def f(x):\n\treturn 'ä → 漢'"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 300
    assert tokenizer.eos_token_id is not None
