"""NeMo 2's own class of a model and what it is called with, without NeMo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models.architecture import Architecture

__all__ = ["Target", "nemo_model"]


@dataclass(frozen=True, slots=True)
class Target:
    """A class of NeMo's or of what it builds upon, by its import path."""

    path: str
    arguments: Mapping[str, Any] | None = None
    """What it is called with, targets among them; None for the function or type itself."""


_MODELS = "nemo.collections.llm.gpt.model"
_CLASSES = {
    "llama": "llama.LlamaModel llama.LlamaConfig",
    "mistral": "mistral.MistralModel mistral.MistralConfig7B",
    "mixtral": "mixtral.MixtralModel mixtral.MixtralConfig",
    "qwen2": "qwen2.Qwen2Model qwen2.Qwen2Config",
    "qwen3": "qwen3.Qwen3Model qwen3.Qwen3Config",
    "qwen3_moe": "qwen3.Qwen3Model qwen3.Qwen3MoEConfig",
    "gemma": "gemma.GemmaModel gemma.GemmaConfig",
    "nemotron": "nemotron.NemotronModel nemotron.NemotronConfig",
}
"""Family -> the model and its config, in ``_MODELS``."""

_SCALED_ROPE = "llama.Llama31Config"

_ACTIVATIONS = {
    "swiglu": "torch.nn.functional.silu",
    "geglu": "nemo.collections.llm.fn.activation.openai_gelu",
    "squared_relu": "nemo.collections.llm.fn.activation.squared_relu",
}


def nemo_model(
    architecture: Architecture, *, tokenizer: str | None, vocab_size: int | None
) -> Target:
    """Describes a model as NeMo 2.7.3's own class of its family is called.

    Every field that the architecture knows is given, whatever the class's default. What only says
    how the model is computed is left to the class: fusions, the layer spec, routing in training.

    Args:
        architecture: The model.
        tokenizer: Directory of the tokenizer, relative to the checkpoint's ``context``; None
            without.
        vocab_size: The rows of the embedding; None lets NeMo pad the tokenizer's.

    Raises:
        UnsupportedModelError: NeMo's class of the family cannot compute the model.
    """
    a = architecture
    model, config = _CLASSES[a.family].split()
    scaling = {}
    if a.rotary_scaling_factor is not None:
        if a.family != "llama":
            raise UnsupportedModelError(
                "of NeMo's models only Llamas scale RoPE",
                where=f"{a.family}'s rotary_scaling_factor",
                found=a.rotary_scaling_factor,
                hint="write megatron: or hf: instead",
            )
        config, scaling = _SCALED_ROPE, {"scale_factor": a.rotary_scaling_factor}
    # Without experts these are NeMo's defaults, which a reader of model.yaml looks for.
    moe: dict[str, Any] = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
    if a.moe:
        moe = {
            "num_moe_experts": a.moe.num_experts,
            "moe_router_topk": a.moe.experts_per_token,
            "moe_ffn_hidden_size": a.ffn_hidden_size,
            "moe_router_pre_softmax": not a.moe.normalized,
        }
    fields: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.head_dim,
        "seq_length": a.max_position_embeddings,
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": 128,
        "normalization": "LayerNorm" if a.normalization == "layernorm1p" else "RMSNorm",
        "layernorm_zero_centered_gamma": a.normalization.endswith("1p"),
        "layernorm_epsilon": a.norm_epsilon,
        "activation_func": Target(_ACTIVATIONS[a.activation]),
        "gated_linear_unit": a.gated,
        "add_bias_linear": False,
        "add_qkv_bias": a.qkv_bias,
        "qk_layernorm": a.qk_norm,
        "window_size": None if a.sliding_window is None else (a.sliding_window - 1, 0),
        "position_embedding_type": "rope",
        "rotary_base": int(a.rotary_base) if a.rotary_base.is_integer() else a.rotary_base,
        "rotary_percent": a.rotary_fraction,
        "seq_len_interpolation_factor": a.rotary_interpolation,
        "share_embeddings_and_output_weights": a.tied_embeddings,
        "fp16": a.dtype == "float16",
        "bf16": a.dtype == "bfloat16",
        "params_dtype": Target(f"torch.{a.dtype}"),
    }
    arguments: dict[str, Any] = {
        "config": Target(f"{_MODELS}.{config}", {**fields, **scaling, **moe})
    }
    if tokenizer is not None:
        arguments["tokenizer"] = Target(
            "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
            {"pretrained_model_name": tokenizer},
        )
    return Target(f"{_MODELS}.{model}", arguments)
