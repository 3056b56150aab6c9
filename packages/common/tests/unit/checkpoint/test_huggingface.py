from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from slimtron_common.checkpoint import Checkpoint, open_checkpoint, save_huggingface
from slimtron_common.checkpoint.writer import write_safetensors
from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.manifest import verify_manifest
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only
from slimtron_common.testing import write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    # transformers 4 and 5 both take rotary parameters under these names.
    "llama 3": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 16384},
    ),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "one key/value head": ("llama", {"num_key_value_heads": 1}),
    "as many key/value heads": ("llama", {"num_key_value_heads": 4}),
    "wide heads": ("llama", {"head_dim": 40}),
    # The window is shorter than the sequence, or it would do nothing.
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}

TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def load(
    path: Path, context: ParallelContext, dtype: torch.dtype = torch.float32
) -> tuple[Checkpoint, nn.Module]:
    checkpoint = open_checkpoint(f"hf:{path}")
    model = build_model(checkpoint.architecture, context, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    checkpoint.load(model, context)
    return checkpoint, model


def logits_of(model: nn.Module, context: ParallelContext) -> torch.Tensor:
    found: list[torch.Tensor] = []
    forward_only(model, [TOKENS], context, lambda _, logits: found.append(logits.clone()))
    return found[0]


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, tmp_path: Path, context: ParallelContext
) -> None:
    family, overrides = MODELS[name]
    path = write_tiny_model(tmp_path / "tiny", family, tokenizer=False, **overrides)
    _, model = load(path, context)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert expected.abs().max() > 1, "the comparison would be of nothing"
    torch.testing.assert_close(logits_of(model, context), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_saved_tensors_are_the_loaded_ones_bit_for_bit(
    name: str, dtype: str, tmp_path: Path, context: ParallelContext
) -> None:
    family, overrides = MODELS[name]
    path = write_tiny_model(tmp_path / "tiny", family, dtype=dtype, tokenizer=False, **overrides)
    checkpoint, model = load(path, context, getattr(torch, dtype))
    save_huggingface(tmp_path / "saved", model, checkpoint.architecture, context)

    before, after = tensors_in(path), tensors_in(tmp_path / "saved")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype is tensor.dtype
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", ["llama, tied", "llama 3", "mistral", "qwen2, window", "qwen3"])
def test_transformers_opens_what_is_saved(
    name: str, tmp_path: Path, context: ParallelContext
) -> None:
    family, overrides = MODELS[name]
    path = write_tiny_model(tmp_path / "tiny", family, **overrides)
    checkpoint, model = load(path, context)
    saved = tmp_path / "saved"
    save_huggingface(
        saved, model, checkpoint.architecture, context, companions=checkpoint.companion_files()
    )

    both = [
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)
        for p in (path, saved)
    ]
    assert type(both[0]) is type(both[1])
    with torch.no_grad():
        assert torch.equal(both[0](TOKENS).logits, both[1](TOKENS).logits)
    assert both[0].generation_config.eos_token_id == both[1].generation_config.eos_token_id
    text = "with open(path) as file:"
    ids = [transformers.AutoTokenizer.from_pretrained(p)(text)["input_ids"] for p in (path, saved)]
    assert ids[0] == ids[1]
    assert verify_manifest(saved).kind == "hf"


def test_saves_in_another_type(tmp_path: Path, context: ParallelContext) -> None:
    path = write_tiny_model(tmp_path / "tiny", tokenizer=False)
    checkpoint, model = load(path, context)
    saved = tmp_path / "saved"
    save_huggingface(saved, model, checkpoint.architecture, context, dtype=torch.bfloat16)
    assert open_checkpoint(f"hf:{saved}").dtype is torch.bfloat16
    before, after = tensors_in(path), tensors_in(saved)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor.bfloat16())
    assert next(model.parameters()).dtype is torch.float32


def test_existing_output_is_kept_unless_it_may_be_replaced(
    tmp_path: Path, context: ParallelContext
) -> None:
    path = write_tiny_model(tmp_path / "tiny", tokenizer=False)
    checkpoint, model = load(path, context)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "precious").touch()
    (saved / "slimtron.json").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        save_huggingface(saved, model, checkpoint.architecture, context)
    assert sorted(file.name for file in saved.iterdir()) == ["precious", "slimtron.json"]
    save_huggingface(saved, model, checkpoint.architecture, context, overwrite=True)
    assert not (saved / "precious").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved", "tiny"]


def test_what_is_known_before_loading(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny", dtype="bfloat16", tie_word_embeddings=True)
    checkpoint = open_checkpoint(f"hf:{path}")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert checkpoint.num_parameters == model.num_parameters()
    assert checkpoint.weight_bytes == (path / "model.safetensors").stat().st_size
    assert checkpoint.kind == "hf"


# From here on: directories that were changed on their way.


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer=False)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of a single-file model, or removes them (None)."""
    tensors = {**load_file(path / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "model.safetensors")


def shard(path: Path, num_files: int = 2) -> dict[str, Any]:
    """Cuts a single-file model into several with an index, which is returned."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::num_files]}
        save_file(part, path / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    write_index(path, index)
    return index


def write_index(path: Path, index: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_model_is_the_same(copy: Path, original: Path, context: ParallelContext) -> None:
    shard(copy, 3)
    found, expected = (logits_of(load(p, context)[1], context) for p in (copy, original))
    assert torch.equal(found, expected)
    checkpoint = open_checkpoint(f"hf:{copy}")
    assert checkpoint.weight_bytes == sum(f.stat().st_size for f in copy.glob("*.safetensors"))


def test_shards_without_an_index_are_read(
    copy: Path, original: Path, context: ParallelContext
) -> None:
    shard(copy)
    (copy / "model.safetensors.index.json").unlink()
    found, expected = (logits_of(load(p, context)[1], context) for p in (copy, original))
    assert torch.equal(found, expected)


def test_other_safetensors_beside_the_model_are_left_alone(
    copy: Path, original: Path, context: ParallelContext
) -> None:
    # Mistral's own repositories hold the weights a second time under other names.
    save_file({"tok_embeddings.weight": torch.zeros(3)}, copy / "consolidated.safetensors")
    found, expected = (logits_of(load(p, context)[1], context) for p in (copy, original))
    assert torch.equal(found, expected)


def test_written_shards_are_bounded_and_indexed(
    copy: Path, tmp_path: Path, context: ParallelContext
) -> None:
    tensors = load_file(copy / "model.safetensors")
    limit = max(tensor.nbytes for tensor in tensors.values()) // 2
    (copy / "model.safetensors").unlink()
    write_safetensors(copy, tensors.items(), context, max_shard_bytes=limit)
    files = sorted(copy.glob("*.safetensors"))
    assert len(files) > 11, "parts with two-digit numbers keep their order, too"
    for sizes in ([t.nbytes for t in load_file(file).values()] for file in files):
        assert len(sizes) == 1 or sum(sizes) <= limit
    # The order of the files is that of the tensors.
    order = [name for file in files for name in load_file(file)]
    position = {name: i for i, name in enumerate(tensors)}
    firsts = [min(position[n] for n in load_file(file)) for file in files]
    assert firsts == sorted(firsts)
    assert sorted(order) == sorted(tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    assert open_checkpoint(f"hf:{copy}").num_parameters == theirs.num_parameters()


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_file_is_refused(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match="cut short") as caught:
        open_checkpoint(f"hf:{copy}")
    assert caught.value.where == file


def test_file_of_another_format_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(f"hf:{copy}")


def test_missing_tensor_is_refused(copy: Path) -> None:
    rewrite(copy, **{"model.layers.2.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match="missing") as caught:
        open_checkpoint(f"hf:{copy}")
    assert "model.layers.2.mlp.up_proj.weight" in str(caught.value.found)


def test_wrong_shape_is_refused(copy: Path) -> None:
    rewrite(copy, **{"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 63)})
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has another shape") as caught:
        open_checkpoint(f"hf:{copy}")
    assert (caught.value.found, caught.value.allowed) == ([32, 63], [32, 64])


def test_extra_tensor_is_refused(copy: Path) -> None:
    rewrite(copy, **{"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match="does not have") as caught:
        open_checkpoint(f"hf:{copy}")
    assert "o_proj.bias" in str(caught.value.found)


def test_rotary_tables_of_old_models_are_left_alone(copy: Path) -> None:
    rewrite(copy, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    open_checkpoint(f"hf:{copy}")


def test_config_of_a_larger_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="missing") as caught:
        open_checkpoint(f"hf:{copy}")
    assert "layers.4." in str(caught.value.found)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_weights_of_an_odd_type_are_refused(copy: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(copy, **{name: load_file(copy / "model.safetensors")[name].to(dtype)})
    with pytest.raises(CheckpointError, match="no weight's"):
        open_checkpoint(f"hf:{copy}")


def test_quantized_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        open_checkpoint(f"hf:{copy}")


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_pickled_weights_are_not_opened(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    torch.save({"model.embed_tokens.weight": Payload(trace)}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors") as caught:
        open_checkpoint(f"hf:{copy}")
    assert "save_pretrained" in str(caught.value.hint)
    assert "pytorch_model.bin" in str(caught.value.found)
    assert not trace.exists()


def test_directory_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        open_checkpoint(f"hf:{copy}")


def test_index_that_names_a_missing_file_is_refused(copy: Path) -> None:
    shard(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        open_checkpoint(f"hf:{copy}")
    assert caught.value.where == copy / "model-00002-of-00002.safetensors"


def test_index_and_files_must_agree(copy: Path) -> None:
    index = shard(copy)
    weight_map = index["weight_map"]
    first, second = sorted(weight_map)[:2]
    assert weight_map[first] != weight_map[second]
    for wrong in (
        {**weight_map, "model.extra": weight_map[first]},
        {name: file for name, file in weight_map.items() if name != first},
        {**weight_map, first: weight_map[second]},
    ):
        write_index(copy, {"weight_map": wrong})
        with pytest.raises(CheckpointError, match="disagree"):
            open_checkpoint(f"hf:{copy}")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ([], "JSON object"),
        ({"weight_map": {"a": 1}}, "no file beside it"),
        ({"weight_map": {"a": "../copy/model-00001-of-00002.safetensors"}}, "no file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file beside it"),
    ],
)
def test_malformed_index_is_refused(copy: Path, index: Any, message: str) -> None:
    shard(copy)
    write_index(copy, index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(f"hf:{copy}")


def test_loads_again_after_the_files_were_closed(copy: Path, context: ParallelContext) -> None:
    checkpoint, model = load(copy, context)
    expected = logits_of(model, context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.load(model, context)
    assert torch.equal(logits_of(model, context), expected)


def test_model_of_another_family_is_not_filled(tmp_path: Path, context: ParallelContext) -> None:
    llama = open_checkpoint(f"hf:{write_tiny_model(tmp_path / 'llama', tokenizer=False)}")
    qwen = open_checkpoint(f"hf:{write_tiny_model(tmp_path / 'qwen', 'qwen2', tokenizer=False)}")
    model = build_model(qwen.architecture, context, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="no rule covers") as caught:
        llama.load(model, context)
    assert "linear_qkv.bias" in str(caught.value.found)
    model = build_model(llama.architecture, context, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="lacks a parameter"):
        qwen.load(model, context)
