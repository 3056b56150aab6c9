"""The ``Architecture`` of a Megatron-Core model that somebody else built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models.adjustments import scales_embeddings
from slimtron_common.models.architecture import (
    Activation,
    Architecture,
    Hybrid,
    MixtureOfExperts,
)
from slimtron_common.models.families import FAMILIES

__all__ = ["ModelFields", "architecture_of", "recognize"]

_ACTIVATIONS: dict[tuple[str, bool], Activation] = {
    ("silu", True): "swiglu",
    ("gelu_tanh", True): "geglu",
    ("fast_gelu", True): "geglu",
    # NeMo's.
    ("openai_gelu", True): "geglu",
    ("squared_relu", False): "squared_relu",
}
"""Name of the function and whether it is gated."""

_NORMALIZATIONS = {
    ("RMSNorm", False): "rmsnorm",
    ("RMSNorm", True): "rmsnorm1p",
    ("LayerNorm", True): "layernorm1p",
}
"""Megatron-Core's name and whether the weight is stored less 1."""

# Fields of Megatron-Core's config that change what a model computes, and the one value known.
_FIXED = {
    "add_bias_linear": False,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
}
_FIXED_MOE = {
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_grouped_gemm": False,
    "moe_latent_size": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFields:
    """What tells a model, as Megatron-Core's config and its ``GPTModel`` name it."""

    config: Any
    """A ``TransformerConfig``, or an object with its fields; a function may stand there by its
    name."""

    vocab_size: int
    max_sequence_length: int
    position_embedding_type: str
    rotary_percent: float
    rotary_base: float
    rotary_scaling_factor: float | None
    """Llama 3's; None without."""

    seq_len_interpolation_factor: float | None
    share_embeddings_and_output_weights: bool
    scaled_embeddings: bool
    hybrid_pattern: str | None = None
    """A letter for each layer of a hybrid; None for a transformer."""


def architecture_of(model: Any) -> Architecture:
    """Reads the architecture off a model.

    Args:
        model: A bare ``GPTModel``, ``MambaModel`` or ``HybridModel``.

    Raises:
        UnsupportedModelError: The model is of no family in ``FAMILIES``.
    """
    # Only the first pipeline stage has the embedding. No other family takes Gemma's activation.
    embedding = getattr(model, "embedding", None)
    rotary = getattr(model, "rotary_pos_emb", None)
    return recognize(
        ModelFields(
            config=model.config,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_sequence_length,
            position_embedding_type=model.position_embedding_type,
            # A hybrid keeps none of these.
            rotary_percent=getattr(model, "rotary_percent", 1.0),
            rotary_base=getattr(model, "rotary_base", 10000),
            rotary_scaling_factor=_rotary_scaling_factor(model),
            seq_len_interpolation_factor=getattr(rotary, "seq_len_interpolation_factor", None),
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            scaled_embeddings=_activation(model.config) == "geglu"
            if embedding is None
            else scales_embeddings(embedding),
            hybrid_pattern=_hybrid_pattern(model),
        )
    )


def recognize(model: ModelFields) -> Architecture:
    """Finds the family of a model and describes it.

    Raises:
        UnsupportedModelError: The model is of no family in ``FAMILIES``.
    """
    config = model.config
    moe, hybrid = _mixture_of_experts(config), _hybrid(model)
    fixed = _FIXED | (_FIXED_MOE if moe else {})
    if moe and moe.shared_ffn_hidden_size:
        fixed["moe_shared_expert_gate"] = True
    differences = [
        f"{name} {found!r}"
        for name, wanted, found in (
            *((name, wanted, getattr(config, name, wanted)) for name, wanted in fixed.items()),
            (
                "position_embedding_type",
                "rope" if hybrid is None else "none",
                model.position_embedding_type,
            ),
        )
        if found != wanted
    ]
    if differences:
        raise UnsupportedModelError(
            "the model computes what no supported family does",
            found=", ".join(differences),
            allowed="RoPE (none in hybrids), no biases but in QKV, softmax routing to experts in "
            "every layer",
        )
    window = None if config.window_size is None else config.window_size[0] + 1
    fraction = float(model.rotary_percent)
    traits = _traits(model)
    family = _family(traits, moe, hybrid, window, fraction)
    if family is None:
        raise UnsupportedModelError(
            "the model is of no supported family",
            found=f"normalization {config.normalization!r}, "
            f"layernorm_zero_centered_gamma {config.layernorm_zero_centered_gamma}, "
            f"activation_func {_name(config.activation_func)}, "
            f"gated_linear_unit {config.gated_linear_unit}, "
            f"add_qkv_bias {config.add_qkv_bias}, qk_layernorm {config.qk_layernorm}, "
            f"num_moe_experts {config.num_moe_experts}, moe_shared_expert_intermediate_size "
            f"{moe.shared_ffn_hidden_size if moe else None}, window_size {config.window_size}, "
            f"rotary_percent {fraction}, layers {model.hybrid_pattern}, "
            f"scaled embeddings {traits['scaled_embeddings']}",
            allowed=", ".join(FAMILIES),
        )
    return Architecture(
        family=family,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe_ffn_hidden_size if moe else config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        head_dim=config.kv_channels,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_sequence_length,
        norm_epsilon=config.layernorm_epsilon,
        rotary_base=float(model.rotary_base),
        rotary_scaling_factor=model.rotary_scaling_factor,
        rotary_interpolation=model.seq_len_interpolation_factor,
        rotary_fraction=fraction,
        moe=moe,
        hybrid=hybrid,
        tied_embeddings=model.share_embeddings_and_output_weights,
        sliding_window=window,
        dtype=_name(config.params_dtype).removeprefix("torch."),
        **traits,
    )


def _traits(model: ModelFields) -> dict[str, Any]:
    """What families differ in; a value that none has is None."""
    config = model.config
    return {
        "activation": _activation(config),
        "normalization": _NORMALIZATIONS.get(
            (config.normalization, bool(config.layernorm_zero_centered_gamma))
        ),
        "scaled_embeddings": model.scaled_embeddings,
        "qkv_bias": bool(config.add_qkv_bias),
        "qk_norm": bool(config.qk_layernorm),
    }


def _activation(config: Any) -> Activation | None:
    return _ACTIVATIONS.get((_name(config.activation_func), config.gated_linear_unit))


def _family(
    traits: dict[str, Any],
    moe: MixtureOfExperts | None,
    hybrid: Hybrid | None,
    window: int | None,
    fraction: float,
) -> str | None:
    defaults = {
        name: field.default
        for name, field in Architecture.__dataclass_fields__.items()
        if name in traits
    }
    for name, family in FAMILIES.items():
        if (
            {**defaults, **family.traits} == traits
            and bool(family.num_experts) == bool(moe)
            and family.is_hybrid == bool(hybrid)
            and bool(family.shared_ffn_hidden_size) == bool(moe and moe.shared_ffn_hidden_size)
            and (window is None or name in ("mistral", "mixtral", "qwen2", "qwen3"))
            and (fraction == 1 or family.rotary_fraction != 1)
            and (moe is None or moe.normalized or name != "mixtral")
        ):
            return name
    return None


def _mixture_of_experts(config: Any) -> MixtureOfExperts | None:
    if config.num_moe_experts is None:
        return None
    return MixtureOfExperts(
        num_experts=config.num_moe_experts,
        experts_per_token=config.moe_router_topk,
        # A softmax over the chosen experts is one over all of them, made to sum to 1.
        normalized=not config.moe_router_pre_softmax,
        shared_ffn_hidden_size=getattr(config, "moe_shared_expert_intermediate_size", None),
    )


def _hybrid_pattern(model: Any) -> str | None:
    pattern = getattr(model, "hybrid_layer_pattern", None)
    # Megatron-Core before 0.19.
    pattern = pattern or getattr(model, "hybrid_override_pattern", None)
    # Bars are the ends of pipeline stages.
    return None if pattern is None else str(pattern).replace("|", "")


def _hybrid(model: ModelFields) -> Hybrid | None:
    pattern, config = model.hybrid_pattern, model.config
    if pattern is None:
        return None
    if not set(pattern) <= set("M*-") or "M" not in pattern:
        raise UnsupportedModelError(
            "the model's layers are not those of a supported hybrid",
            found=pattern,
            allowed="Mamba (M), attention (*) and dense feed-forward networks (-), one M or more",
        )
    heads = config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim
    return Hybrid(
        pattern=pattern,
        mamba_num_heads=heads,
        mamba_head_dim=config.mamba_head_dim,
        mamba_num_groups=config.mamba_num_groups,
        mamba_state_dim=config.mamba_state_dim,
    )


def _rotary_scaling_factor(model: Any) -> float | None:
    # Megatron-Core does not keep the factor; Llama 3's scaling divides the lowest frequency by it.
    if not getattr(model, "rotary_scaling", False):
        return None
    frequencies = model.rotary_pos_emb.inv_freq
    dim = 2 * len(frequencies)
    unscaled: float = float(model.rotary_base) ** (-(dim - 2) / dim)
    return round(unscaled / float(frequencies[-1]), 3)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))
