from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slimtron_common.checkpoint import open_checkpoint, save_huggingface, save_megatron
from slimtron_common.errors import CheckpointError, ConfigError, UnsupportedModelError
from slimtron_common.inspection import inspect_checkpoint
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.testing import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen3", dtype="bfloat16")


@pytest.fixture(scope="module")
def saved(tiny: Path) -> dict[str, Path]:
    """What Slimtron writes, of both kinds."""
    paths = {"hf": tiny.with_name("hf"), "megatron": tiny.with_name("megatron")}
    checkpoint = open_checkpoint(f"hf:{tiny}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.bfloat16)
        checkpoint.load(model, context)
        save_huggingface(paths["hf"], model, checkpoint.architecture, context)
        save_megatron(paths["megatron"], model, checkpoint.architecture, context)
    return paths


def component(name: str) -> str:
    if "norm" in name:
        return "norms"
    words = {"embed": "embedding", "attn": "attention", "mlp": "mlp", "lm_head": "output"}
    return next(component for word, component in words.items() if word in name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_counted_by_component(family: str, tied: bool, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "a", family, tie_word_embeddings=tied, tokenizer=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    expected: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        key = component(name)
        expected[key] = expected.get(key, 0) + parameter.numel()
    found = inspect_checkpoint(f"hf:{path}")
    assert found.parameters == expected
    assert found.num_parameters == model.num_parameters()
    assert ("output" in found.parameters) is not tied


def test_original_checkpoint(tiny: Path) -> None:
    found = inspect_checkpoint(f"hf:{tiny}")
    assert (found.kind, found.path) == ("hf", str(tiny))
    assert found.architecture.family == "qwen3"
    assert found.dtypes == {"bfloat16": found.num_parameters}
    assert found.weight_bytes == (tiny / "model.safetensors").stat().st_size
    assert found.tokenizer
    assert found.quantization is None
    assert found.manifest is None
    assert found.tensor_parallel_sizes == [1, 2]
    assert found.pipeline_parallel_sizes == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_checkpoint_that_slimtron_wrote(kind: str, tiny: Path, saved: dict[str, Path]) -> None:
    original = inspect_checkpoint(f"hf:{tiny}")
    found = inspect_checkpoint(f"{kind}:{saved[kind]}")
    assert found.architecture == original.architecture
    assert found.parameters == original.parameters
    assert found.dtypes == original.dtypes
    assert not found.tokenizer
    assert found.manifest is not None
    assert found.manifest.kind == kind
    assert found.weight_bytes >= 2 * found.num_parameters


def test_quantized_directory_is_described(tiny: Path, tmp_path: Path) -> None:
    """Weights of a quarter of the size, and scales: as compressed-tensors packs them."""
    path = Path(shutil.copytree(tiny, tmp_path / "quantized"))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "mlp" in name]:
        weight = tensors.pop(name)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.weight_packed"] = torch.zeros(weight.shape[0], 8, dtype=torch.int32)
        tensors[f"{stem}.weight_scale"] = torch.ones(weight.shape[0], 1, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))

    found = inspect_checkpoint(f"hf:{path}")
    assert found.quantization == {"quant_method": "compressed-tensors", "bits": 4}
    assert found.parameters == inspect_checkpoint(f"hf:{tiny}").parameters
    assert found.dtypes["int32"] == 4 * (96 + 96 + 64) * 8
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        open_checkpoint(f"hf:{path}")


@pytest.mark.parametrize("name", ["hf", "megatron", "tiny"])
def test_description_is_json(name: str, tiny: Path, saved: dict[str, Path]) -> None:
    spec = f"hf:{tiny}" if name == "tiny" else f"{name}:{saved[name]}"
    found = inspect_checkpoint(spec)
    text = json.dumps(found.to_dict())
    content = json.loads(text)
    assert content["num_parameters"] == found.num_parameters
    assert content["architecture"]["hidden_size"] == 64
    assert content["tensor_parallel_sizes"] == [1, 2]


def test_no_weight_is_read(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    content = bytearray((path / "model.safetensors").read_bytes())
    # Not a number in sight: reading them as weights would show.
    content[-1000:] = b"\xff" * 1000
    (path / "model.safetensors").write_bytes(content)
    assert inspect_checkpoint(f"hf:{path}").num_parameters > 0


def test_unsound_checkpoints_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind"):
        inspect_checkpoint("tiny")
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_checkpoint(f"hf:{tmp_path}")
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (path / "slimtron.json").write_text("{}")
    with pytest.raises(CheckpointError, match="manifest"):
        inspect_checkpoint(f"hf:{path}")
    with pytest.raises(CheckpointError, match="weights"):
        inspect_checkpoint(f"megatron:{path}")
