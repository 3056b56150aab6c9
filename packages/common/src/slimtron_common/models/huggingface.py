"""Hugging Face's ``config.json`` read into an ``Architecture`` and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.models.architecture import Architecture, MixtureOfExperts
from slimtron_common.models.families import FAMILIES, Family
from slimtron_common.models.fields import flag, integer, number
from slimtron_common.models.hybrid import HYBRID_FIELDS, hybrid_fields, read_hybrid

__all__ = ["architecture_from_config", "config_from_architecture"]

_MODELLED = frozenset(
    {
        "architectures", "model_type", "num_hidden_layers", "hidden_size",
        "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "max_position_embeddings", "rope_theta", "rope_scaling",
        "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window",
        "use_sliding_window", "max_window_layers", "layer_types", "hidden_act",
        "hidden_activation", "dtype", "torch_dtype", "transformers_version", "pretraining_tp",
        "partial_rotary_factor", "quantization_config", "num_local_experts", "num_experts",
        "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
        "use_bidirectional_attention", "qkv_bias", "mlp_hidden_act", *HYBRID_FIELDS,
    }
)  # fmt: skip

_ACTIVATIONS = {
    "swiglu": ("silu", "swish"),
    "geglu": ("gelu_pytorch_tanh",),
    "squared_relu": ("relu2",),
}
"""Hugging Face's names of the functions; the first is written."""

_SPARSE_QWENS = ("qwen2_moe", "qwen3_moe")

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
    name, names = str(config.get("model_type")), config.get("architectures")
    family = FAMILIES.get(name)
    if family is None or names not in (None, [], [family.hf_class]):
        raise UnsupportedModelError(
            "this architecture cannot be opened",
            where=source,
            found=f"model_type {name!r}, architectures {names!r}",
            allowed=", ".join(f"{k} ({v.hf_class})" for k, v in FAMILIES.items()),
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedModelError(
            "the model is already quantized",
            where=source,
            found=f"quantization_config {method!r}",
            hint="start from the original, unquantized checkpoint",
        )
    _refuse_features(config, family, source)
    heads = integer(config, "num_attention_heads", source)
    groups = integer(config, "num_key_value_heads", source, default=heads)
    if heads % groups:
        raise CheckpointError(
            "num_key_value_heads must divide num_attention_heads",
            where=source,
            found=f"{groups} and {heads}",
        )
    hidden = integer(config, "hidden_size", source)
    hybrid = read_hybrid(config, source) if family.is_hybrid else None
    layers = len(hybrid.pattern) if hybrid else integer(config, "num_hidden_layers", source)
    own_names = {family.norm_epsilon, family.ffn_hidden_size, family.shared_ffn_hidden_size}
    return Architecture(
        family=name,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=integer(config, family.ffn_hidden_size, source),
        num_attention_heads=heads,
        num_query_groups=groups,
        # A hybrid's heads are wider than its hidden size would have them.
        head_dim=integer(config, "head_dim", source, default=128 if hybrid else hidden // heads),
        vocab_size=integer(config, "vocab_size", source),
        max_position_embeddings=integer(config, "max_position_embeddings", source),
        norm_epsilon=number(config, family.norm_epsilon, source, default=1e-6),
        moe=_mixture_of_experts(config, family, source) if family.num_experts else None,
        hybrid=hybrid,
        tied_embeddings=flag(config, "tie_word_embeddings", source, default=family.tied_embeddings),
        sliding_window=_sliding_window(config, name, layers, source),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        hf_extras={k: v for k, v in config.items() if k not in _MODELLED | own_names},
        **({"rotary_base": family.rotary_base} if hybrid else _rotary(config, family, source)),
        **family.traits,
    )


def config_from_architecture(
    architecture: Architecture, *, dtype: str | None = None
) -> dict[str, Any]:
    """Writes the contents of a ``config.json`` that transformers 4 and 5 and engines read.

    Args:
        architecture: The model.
        dtype: Type of the weights that are written; the architecture's own without it.
    """
    a = _loadable(architecture)
    family = FAMILIES[a.family]
    scaling: dict[str, Any] | None = None
    if a.rotary_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": a.rotary_scaling_factor, **_LLAMA3_CONSTANTS}
    elif a.rotary_interpolation is not None:
        scaling = {"rope_type": "linear", "factor": a.rotary_interpolation}
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": a.family,
        **a.hf_extras,
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        family.ffn_hidden_size: a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        family.hidden_act: _ACTIVATIONS[a.activation][0],
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        family.norm_epsilon: a.norm_epsilon,
        "tie_word_embeddings": a.tied_embeddings,
        "torch_dtype": dtype or a.dtype,
    }
    if a.hybrid is None:
        config.update(rope_theta=a.rotary_base, rope_scaling=scaling)
    else:
        config.update(hybrid_fields(a.hybrid))
    if family.rotary_fraction != 1:
        config["partial_rotary_factor"] = a.rotary_fraction
    if a.family not in ("qwen2", "qwen2_moe", "mistral", "mixtral"):
        config["attention_bias"] = False
    if a.moe is not None and family.num_experts is not None:
        config[family.num_experts] = a.moe.num_experts
        config["num_experts_per_tok"] = a.moe.experts_per_token
        if family.shared_ffn_hidden_size is not None:
            config[family.shared_ffn_hidden_size] = a.moe.shared_ffn_hidden_size
        if a.family in _SPARSE_QWENS:
            config.update(
                norm_topk_prob=a.moe.normalized, decoder_sparse_step=1, mlp_only_layers=[]
            )
    if a.family in ("mistral", "mixtral"):
        config["sliding_window"] = a.sliding_window
    elif a.family.startswith("qwen"):
        config["use_sliding_window"] = a.sliding_window is not None
        if a.sliding_window is not None:
            config.update(sliding_window=a.sliding_window, max_window_layers=0)
    return config


def _loadable(architecture: Architecture) -> Architecture:
    """Names a family whose config transformers accepts.

    Its Llama wants the hidden size to be a multiple of the heads, though the width of a head is
    given. Mistral without a window is the same model under the same names, and takes any.
    """
    a = architecture
    if a.family == "llama" and a.hidden_size % a.num_attention_heads:
        return replace(a, family="mistral")
    return a


def _refuse_features(config: Mapping[str, Any], family: Family, source: str) -> None:
    def refuse(name: str, allowed: str) -> None:
        raise UnsupportedModelError(
            f"{name} is not supported", where=source, found=config.get(name), allowed=allowed
        )

    activations = _ACTIVATIONS[family.traits.get("activation", "swiglu")]
    # Gemma's first configs have two fields, and the second is the one that counts.
    field = "hidden_activation" if config.get("hidden_activation") else family.hidden_act
    if config.get(field, activations[0]) not in activations:
        refuse(field, activations[0])
    if config.get("mlp_bias"):
        refuse("mlp_bias", "false")
    # In transformers this also puts a bias on o_proj, which Megatron-Core can only have together
    # with biases in the feed-forward layers. Qwen2 has no such field.
    if config.get("attention_bias") and config["model_type"] != "qwen2":
        refuse("attention_bias", "false")
    if config["model_type"] == "qwen2_moe" and config.get("qkv_bias") is False:
        refuse("qkv_bias", "true")
    if config.get("use_bidirectional_attention"):
        refuse("use_bidirectional_attention", "false")
    if family.rotary_fraction == 1 and config.get("partial_rotary_factor") not in (None, 1):
        refuse("partial_rotary_factor", "1")
    if config["model_type"] in _SPARSE_QWENS:
        if config.get("use_sliding_window"):
            refuse("use_sliding_window", "false")
        if config.get("decoder_sparse_step", 1) != 1:
            refuse("decoder_sparse_step", "1: experts in every layer")
        if config.get("mlp_only_layers"):
            refuse("mlp_only_layers", "[]: experts in every layer")


def _mixture_of_experts(config: Mapping[str, Any], family: Family, source: str) -> MixtureOfExperts:
    # transformers 5 writes num_local_experts for Qwen3, too.
    field = "num_local_experts" if "num_local_experts" in config else "num_experts"
    moe = MixtureOfExperts(
        num_experts=integer(config, field, source),
        experts_per_token=integer(config, "num_experts_per_tok", source),
        normalized=config["model_type"] == "mixtral" or flag(config, "norm_topk_prob", source),
        shared_ffn_hidden_size=None
        if family.shared_ffn_hidden_size is None
        else integer(config, family.shared_ffn_hidden_size, source),
    )
    if moe.experts_per_token > moe.num_experts:
        raise CheckpointError(
            "a token cannot go to more experts than there are",
            where=source,
            found=f"num_experts_per_tok {moe.experts_per_token}, {field} {moe.num_experts}",
        )
    if moe.experts_per_token == 1 and moe.normalized:
        raise UnsupportedModelError(
            "one expert a token, whose weight is always 1, is not supported",
            where=source,
            found="num_experts_per_tok 1",
            allowed="2 or more, or a model with norm_topk_prob false",
        )
    return moe


def _rotary(config: Mapping[str, Any], family: Family, source: str) -> dict[str, Any]:
    # transformers 5 holds base and scaling in `rope_parameters`; 4 has two fields.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(
            "the rotary parameters must be an object", where=source, found=repr(parameters)
        )
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    both = {**config, **parameters}
    found = {"rotary_base": number(both, "rope_theta", source, default=family.rotary_base)}
    ignored = {"rope_type", "type", "rope_theta"}
    if family.rotary_fraction != 1:
        ignored.add("partial_rotary_factor")
        fraction = number(both, "partial_rotary_factor", source, default=family.rotary_fraction)
        if fraction > 1:
            raise CheckpointError(
                "partial_rotary_factor must be at most 1", where=source, found=fraction
            )
        found["rotary_fraction"] = fraction
    settings = {
        name: value
        for name, value in parameters.items()
        if name not in ignored
        and value is not None
        and (name, value) != ("partial_rotary_factor", 1)
    }
    if kind == "default" and settings.keys() <= {"factor", "original_max_position_embeddings"}:
        return found
    if kind == "linear" and settings.keys() - {"original_max_position_embeddings"} == {"factor"}:
        return {**found, "rotary_interpolation": number(settings, "factor", source)}
    if kind == "llama3" and settings == {"factor": settings.get("factor"), **_LLAMA3_CONSTANTS}:
        return {**found, "rotary_scaling_factor": number(settings, "factor", source)}
    raise UnsupportedModelError(
        "this RoPE scaling is not what Megatron-Core computes",
        where=source,
        found={"rope_type": kind, **settings},
        allowed=f"default, linear with a factor, or llama3 with a factor and {_LLAMA3_CONSTANTS}",
    )


def _sliding_window(
    config: Mapping[str, Any], family: str, num_layers: int, source: str
) -> int | None:
    if family not in ("mistral", "mixtral", "qwen2", "qwen3"):
        return None
    # What transformers takes for a field that is absent, not null.
    if config.get("sliding_window", None if family == "mixtral" else 4096) is None:
        return None
    if family.startswith("qwen"):
        if not flag(config, "use_sliding_window", source):
            return None
        first = integer(config, "max_window_layers", source, default=28, minimum=0)
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
    return integer(config, "sliding_window", source, default=4096)
