"""Hugging Face's ``config.json`` read into an ``Architecture`` and written from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.models.architecture import Architecture

__all__ = ["FAMILIES", "architecture_from_config", "config_from_architecture"]

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""``model_type`` -> the class in ``architectures``."""

_MODELLED = frozenset(
    {
        "architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size",
        "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
        "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window",
        "use_sliding_window", "max_window_layers", "layer_types", "hidden_act", "dtype",
        "torch_dtype", "transformers_version", "pretraining_tp", "partial_rotary_factor",
        "quantization_config",
    }
)  # fmt: skip

# What Megatron-Core's rotary embedding has built in for Llama 3's scaling.
_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def architecture_from_config(config: Mapping[str, Any], *, source: str) -> Architecture:
    """Reads the contents of a ``config.json``.

    Args:
        config: The parsed file, of transformers 4 or 5.
        source: Path of the file, for messages.

    Raises:
        UnsupportedModelError: The architecture, or a feature of it, has no counterpart here.
        CheckpointError: A field is missing or has the wrong type.
    """
    family, names = str(config.get("model_type")), config.get("architectures")
    if family not in FAMILIES or names not in (None, [], [FAMILIES[family]]):
        raise UnsupportedModelError(
            "this architecture cannot be opened",
            where=source,
            found=f"model_type {family!r}, architectures {names!r}",
            allowed=", ".join(f"{k} ({v})" for k, v in FAMILIES.items()),
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedModelError(
            "the model is already quantized",
            where=source,
            found=f"quantization_config {method!r}",
            hint="start from the original, unquantized checkpoint",
        )
    _refuse_features(config, source)
    heads = _integer(config, "num_attention_heads", source)
    groups = _integer(config, "num_key_value_heads", source, default=heads)
    if heads % groups:
        raise CheckpointError(
            "num_key_value_heads must divide num_attention_heads",
            where=source,
            found=f"{groups} and {heads}",
        )
    hidden = _integer(config, "hidden_size", source)
    layers = _integer(config, "num_hidden_layers", source)
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_integer(config, "intermediate_size", source),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_integer(config, "head_dim", source, default=hidden // heads),
        vocab_size=_integer(config, "vocab_size", source),
        max_position_embeddings=_integer(config, "max_position_embeddings", source),
        norm_epsilon=_number(config, "rms_norm_eps", source, default=1e-6),
        tied_embeddings=_flag(config, "tie_word_embeddings", source),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(config, family, layers, source),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        hf_extras={k: v for k, v in config.items() if k not in _MODELLED},
        **_rotary(config, source),
    )


def config_from_architecture(
    architecture: Architecture, *, dtype: str | None = None
) -> dict[str, Any]:
    """Writes the contents of a ``config.json`` that transformers 4 and 5 and engines read.

    Args:
        architecture: The model.
        dtype: Type of the weights that are written; the architecture's own without it.
    """
    a = architecture
    scaling: dict[str, Any] | None = None
    if a.rotary_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": a.rotary_scaling_factor, **_LLAMA3_CONSTANTS}
    elif a.rotary_interpolation is not None:
        scaling = {"rope_type": "linear", "factor": a.rotary_interpolation}
    config: dict[str, Any] = {
        "architectures": [FAMILIES[a.family]],
        "model_type": a.family,
        **a.hf_extras,
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.norm_epsilon,
        "rope_theta": a.rotary_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": a.tied_embeddings,
        "torch_dtype": dtype or a.dtype,
    }
    if a.family in ("llama", "qwen3"):
        config["attention_bias"] = a.qkv_bias
    if a.family == "mistral":
        config["sliding_window"] = a.sliding_window
    elif a.family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = a.sliding_window is not None
        if a.sliding_window is not None:
            config.update(sliding_window=a.sliding_window, max_window_layers=0)
    return config


def _refuse_features(config: Mapping[str, Any], source: str) -> None:
    def refuse(name: str, allowed: str) -> None:
        raise UnsupportedModelError(
            f"{name} is not supported", where=source, found=config.get(name), allowed=allowed
        )

    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "silu")
    if config.get("mlp_bias"):
        refuse("mlp_bias", "false")
    # In transformers' Llama and Qwen3 this also puts a bias on o_proj, which Megatron-Core can
    # only have together with biases in the feed-forward layers. Qwen2 has no such field.
    if config.get("attention_bias") and config["model_type"] != "qwen2":
        refuse("attention_bias", "false")
    if config.get("partial_rotary_factor") not in (None, 1):
        refuse("partial_rotary_factor", "1")


def _rotary(config: Mapping[str, Any], source: str) -> dict[str, float]:
    # transformers 5 holds base and scaling in `rope_parameters`; 4 has two fields.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(
            "the rotary parameters must be an object", where=source, found=repr(parameters)
        )
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    base = _number({**config, **parameters}, "rope_theta", source, default=10000.0)
    settings = {
        name: value
        for name, value in parameters.items()
        if name not in ("rope_type", "type", "rope_theta")
        and value is not None
        and (name, value) != ("partial_rotary_factor", 1)
    }
    if kind == "default" and settings.keys() <= {"factor", "original_max_position_embeddings"}:
        return {"rotary_base": base}
    if kind == "linear" and settings.keys() - {"original_max_position_embeddings"} == {"factor"}:
        return {"rotary_base": base, "rotary_interpolation": _number(settings, "factor", source)}
    if kind == "llama3" and settings == {"factor": settings.get("factor"), **_LLAMA3_CONSTANTS}:
        return {"rotary_base": base, "rotary_scaling_factor": _number(settings, "factor", source)}
    raise UnsupportedModelError(
        "this RoPE scaling is not what Megatron-Core computes",
        where=source,
        found={"rope_type": kind, **settings},
        allowed=f"default, linear with a factor, or llama3 with a factor and {_LLAMA3_CONSTANTS}",
    )


def _sliding_window(
    config: Mapping[str, Any], family: str, num_layers: int, source: str
) -> int | None:
    # What transformers takes for a field that is absent, not null.
    if family == "llama" or config.get("sliding_window", 4096) is None:
        return None
    if family.startswith("qwen"):
        if not _flag(config, "use_sliding_window", source):
            return None
        first = _integer(config, "max_window_layers", source, default=28, minimum=0)
        derived = ["full_attention"] * first + ["sliding_attention"] * num_layers
        kinds = config.get("layer_types") or derived[:num_layers]
        if "sliding_attention" not in kinds:
            return None
        if set(kinds) != {"sliding_attention"}:
            raise UnsupportedModelError(
                "a sliding window in some layers only is not supported",
                where=source,
                found=f"max_window_layers {first}, layer_types {config.get('layer_types')}",
                allowed="a window in all layers, or in none",
            )
    return _integer(config, "sliding_window", source, default=4096)


def _integer(
    config: Mapping[str, Any],
    name: str,
    source: str,
    *,
    default: int | None = None,
    minimum: int = 1,
) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(
            f"{name} must be an integer of {minimum} or more", where=source, found=repr(value)
        )
    return value


def _number(
    config: Mapping[str, Any], name: str, source: str, *, default: float | None = None
) -> float:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{name} must be a positive number", where=source, found=repr(value))
    return float(value)


def _flag(config: Mapping[str, Any], name: str, source: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} must be true or false", where=source, found=repr(value))
    return value
