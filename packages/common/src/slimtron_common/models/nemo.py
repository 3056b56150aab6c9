"""A NeMo 2 ``model.yaml`` read into an ``Architecture``, without NeMo.

NeMo writes every field of the model's config, classes and functions by their import path under
``_target_``. The paths are looked at as text; nothing is imported or called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.families import FAMILIES
from slimtron_common.models.recognition import ModelFields, recognize

__all__ = ["architecture_from_nemo"]

_MODELS = "nemo.collections.llm.gpt.model."
_FAMILIES = {
    "base": (),
    "llama": ("llama",),
    "mistral": ("mistral",),
    "mixtral": ("mixtral",),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3", "qwen3_moe"),
    "gemma": ("gemma",),
    "nemotron": ("nemotron",),
}
"""Module of NeMo's model class -> the families that its models may be of; () for any."""

_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
# What makes a Llama 4 of NeMo's Llama; heterogeneous layers; adapters of LoRA.
_REFUSED = {
    "nope_layer_interval": None,
    "attention_chunk_size": None,
    "heterogeneous_block_specs": False,
    "mtp_num_layers": None,
    "softmax_scale": None,
    "is_hybrid_model": False,
}


def architecture_from_nemo(
    description: Mapping[str, Any], *, vocab_size: int, source: str
) -> Architecture:
    """Reads the contents of a ``model.yaml``.

    Args:
        description: The parsed file.
        vocab_size: The tokenizer's, for a config that does not name it.
        source: Path of the file, for messages.

    Raises:
        UnsupportedModelError: The model, or a feature of it, has no counterpart here.
        CheckpointError: A field is missing.
    """
    target = str(description.get("_target_"))
    module = target.removeprefix(_MODELS).rpartition(".")[0]
    if not target.startswith(_MODELS) or module not in _FAMILIES:
        raise UnsupportedModelError(
            "this NeMo model cannot be opened",
            where=source,
            found=f"_target_ {target}",
            allowed=", ".join(f"{_MODELS}{name}" for name in _FAMILIES),
            hint="Slimtron computes no model of another family; NeMo 2's own llm.modelopt does",
        )
    if description.get("model_transform") is not None:
        raise UnsupportedModelError(
            "the checkpoint has adapters (PEFT) beside the model",
            where=source,
            found="model_transform",
            hint="merge them in NeMo first (llm.peft.merge_lora)",
        )
    fields = description.get("config")
    if not isinstance(fields, Mapping):
        raise CheckpointError("the model's config is missing", where=source, found=fields)
    config = SimpleNamespace(**{name: _plain(value) for name, value in fields.items()})
    refused = [
        f"{name} {found!r}"
        for name, usual in _REFUSED.items()
        if (found := getattr(config, name, usual)) != usual
    ]
    if refused:
        raise UnsupportedModelError(
            "the model computes what no supported family does",
            where=source,
            found=", ".join(refused),
        )
    # How a layer of experts is computed, not what.
    config.moe_grouped_gemm = False
    try:
        if config.kv_channels is None:
            config.kv_channels = config.hidden_size // config.num_attention_heads
        if config.ffn_hidden_size is None:
            config.ffn_hidden_size = 4 * config.hidden_size
        if config.moe_ffn_hidden_size is None:
            config.moe_ffn_hidden_size = config.ffn_hidden_size
        config.params_dtype = (
            "bfloat16" if config.bf16 else "float16" if config.fp16 else config.params_dtype
        )
        architecture = recognize(
            ModelFields(
                config=config,
                vocab_size=config.vocab_size or vocab_size,
                max_sequence_length=config.seq_length,
                position_embedding_type=config.position_embedding_type,
                rotary_percent=config.rotary_percent,
                rotary_base=config.rotary_base,
                rotary_scaling_factor=_rotary_scaling(config, source),
                seq_len_interpolation_factor=config.seq_len_interpolation_factor,
                share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
                # NeMo's Gemma scales them outside of Megatron-Core.
                scaled_embeddings=module == "gemma",
            )
        )
    except AttributeError as error:
        raise CheckpointError(
            "a field of the model's config is missing", where=source, found=error.name
        ) from error
    except UnsupportedModelError as error:
        error.where = source
        raise
    return _of_family(architecture, _FAMILIES[module])


def _of_family(architecture: Architecture, families: tuple[str, ...]) -> Architecture:
    """Names a model after its NeMo class, where Megatron-Core does not tell the families apart."""
    for name in families:
        family = FAMILIES[name]
        same_kind = bool(family.num_experts) == bool(architecture.moe)
        if same_kind and family.traits == FAMILIES[architecture.family].traits:
            return dataclasses.replace(architecture, family=name)
    return architecture


def _rotary_scaling(config: Any, source: str) -> float | None:
    factor = getattr(config, "scale_factor", None)
    if factor is None:
        return None
    found = {name: getattr(config, name, usual) for name, usual in _LLAMA3_CONSTANTS.items()}
    if found != _LLAMA3_CONSTANTS:
        raise UnsupportedModelError(
            "this RoPE scaling is not what Megatron-Core computes",
            where=source,
            found=found,
            allowed=_LLAMA3_CONSTANTS,
        )
    return float(factor)


def _plain(value: Any) -> Any:
    """A function or type as its own name; other values as they are."""
    if isinstance(value, Mapping) and "_target_" in value:
        return str(value["_target_"]).rpartition(".")[2]
    return value
