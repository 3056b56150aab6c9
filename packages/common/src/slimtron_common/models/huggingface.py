"""Hugging Face's ``config.json`` read into an ``Architecture`` and written from one."""

from __future__ import annotations

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
        "torch_dtype", "transformers_version", "pretraining_tp", "quantization_config",
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
    family = config.get("model_type")
    names = config.get("architectures") or [FAMILIES.get(str(family))]
    if family not in FAMILIES or names[0] != FAMILIES[family]:
        raise UnsupportedModelError(
            "this architecture cannot be opened",
            where=source,
            found=f"model_type {family!r}, architectures {config.get('architectures')!r}",
            allowed=", ".join(f"{k} ({v})" for k, v in FAMILIES.items()),
        )
    if "quantization_config" in config:
        raise UnsupportedModelError(
            "the model is already quantized",
            where=source,
            found=f"quantization_config {config['quantization_config'].get('quant_method')!r}",
            hint="start from the original, unquantized checkpoint",
        )
    _refuse_features(config, source)
    heads = _integer(config, "num_attention_heads", source)
    hidden = _integer(config, "hidden_size", source)
    return Architecture(
        family=family,
        num_layers=_integer(config, "num_hidden_layers", source),
        hidden_size=hidden,
        ffn_hidden_size=_integer(config, "intermediate_size", source),
        num_attention_heads=heads,
        num_query_groups=_integer(config, "num_key_value_heads", source, default=heads),
        head_dim=_integer(config, "head_dim", source, default=hidden // heads),
        vocab_size=_integer(config, "vocab_size", source),
        max_position_embeddings=_integer(config, "max_position_embeddings", source),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        # Qwen2 has these biases by definition; the others by this field.
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(config, family),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        hf_extras={k: v for k, v in config.items() if k not in _MODELLED},
        **_rotary(config, source),
    )


def config_from_architecture(architecture: Architecture, *, dtype: str | None = None) -> dict[str, Any]:
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
    # only have together with biases in the feed-forward layers.
    if config.get("attention_bias") and config["model_type"] != "qwen2":
        refuse("attention_bias", "false")
    if config.get("use_sliding_window") and config.get("max_window_layers", 0) > 0:
        refuse("max_window_layers", "0: all layers alike")


def _rotary(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    # transformers 5 holds base and scaling in `rope_parameters`; 4 has two fields.
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = parameters.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind == "default":
        return {"rotary_base": float(base)}
    factor = parameters.pop("factor", None)
    if kind == "linear" and factor:
        return {"rotary_base": float(base), "rotary_interpolation": float(factor)}
    if kind == "llama3" and factor and all(
        parameters.get(name) == value for name, value in _LLAMA3_CONSTANTS.items()
    ):
        return {"rotary_base": float(base), "rotary_scaling_factor": float(factor)}
    raise UnsupportedModelError(
        "this RoPE scaling is not what Megatron-Core computes",
        where=source,
        found={"rope_type": kind, "factor": factor, **parameters},
        allowed=f"default, linear, or llama3 with {_LLAMA3_CONSTANTS}",
    )


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    window = config.get("sliding_window")
    if window is None or (family in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        return None
    return int(window)


def _integer(config: Mapping[str, Any], name: str, source: str, *, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{name} must be a positive integer", where=source, found=repr(value)
        )
    return value
