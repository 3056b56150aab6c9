"""An ``Architecture`` built as a Megatron-Core GPT."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from slimtron_common.errors import (
    MissingDependencyError,
    ParallelismError,
    UnsupportedModelError,
)
from slimtron_common.models.architecture import Architecture
from slimtron_common.parallel.context import ParallelContext

__all__ = [
    "LayerSpec",
    "architecture_of",
    "build_model",
    "transformer_config",
    "transformer_engine_available",
]

LayerSpec = Literal["auto", "local", "transformer_engine"]


def transformer_engine_available() -> bool:
    """Tells whether Transformer Engine is installed (not whether its kernels run here)."""
    return importlib.util.find_spec("transformer_engine") is not None


def build_model(
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    layer_spec: LayerSpec = "auto",
) -> nn.Module:
    """Builds this process's part of the model, its weights uninitialised.

    Args:
        architecture: The model.
        context: This process's place.
        dtype: Type of the parameters.
        layer_spec: ``transformer_engine``'s modules, Megatron-Core's own (``local``), or
            ``auto``: Transformer Engine's on a GPU where it is installed.

    Returns:
        ``megatron.core.models.gpt.GPTModel`` in eval mode on ``context.device``.

    Raises:
        ParallelismError: The model cannot be cut this way.
        MissingDependencyError: Transformer Engine was asked for and is not installed.
    """
    from megatron.core.models.gpt import GPTModel

    architecture.check_parallel(
        tensor_parallel_size=context.tp_size, pipeline_parallel_size=context.pp_size
    )
    use_te = _use_transformer_engine(layer_spec, context)
    config = transformer_config(architecture, context, dtype=dtype)
    with _quiet_construction():
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(architecture, config, use_te),
            vocab_size=architecture.padded_vocab_size(context.tp_size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=context.is_first_stage,
            post_process=context.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=_rotary_base(architecture),
            rope_scaling=architecture.rotary_scaling_factor is not None,
            rope_scaling_factor=architecture.rotary_scaling_factor or 8.0,
            seq_len_interpolation_factor=architecture.rotary_interpolation,
        )
    model.requires_grad_(False)
    built: nn.Module = model.eval().to(context.device)
    return built


def architecture_of(model: Any) -> Architecture:
    """Reads the architecture off a model that somebody else built.

    Args:
        model: A bare ``GPTModel``.

    Raises:
        UnsupportedModelError: The model is not of the Llama family.
    """
    config = model.config
    qk_norm, qkv_bias = bool(config.qk_layernorm), bool(config.add_qkv_bias)
    differences = [
        f"{name} {found!r}"
        for name, wanted, found in (
            ("normalization", "RMSNorm", config.normalization),
            ("gated_linear_unit", True, config.gated_linear_unit),
            ("activation_func", F.silu, config.activation_func),
            ("add_bias_linear", False, config.add_bias_linear),
            ("num_moe_experts", None, config.num_moe_experts),
            ("multi_latent_attention", False, config.multi_latent_attention),
            ("position_embedding_type", "rope", model.position_embedding_type),
            ("rotary_interleaved", False, config.rotary_interleaved),
            ("layernorm_zero_centered_gamma", False, config.layernorm_zero_centered_gamma),
            ("qk_layernorm with add_qkv_bias", False, qk_norm and qkv_bias),
        )
        if found != wanted
    ]
    if differences:
        raise UnsupportedModelError(
            "the model is not of the Llama family",
            found=", ".join(differences),
            allowed="RMSNorm, SwiGLU, RoPE, no biases but in QKV, dense layers",
        )
    rotary = getattr(model, "rotary_pos_emb", None)
    window = None if config.window_size is None else config.window_size[0] + 1
    # In Hugging Face's terms; Mistral is a Llama with a window.
    plain = "llama" if window is None else "mistral"
    return Architecture(
        family="qwen3" if qk_norm else "qwen2" if qkv_bias else plain,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        head_dim=config.kv_channels,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_sequence_length,
        norm_epsilon=config.layernorm_epsilon,
        rotary_base=float(model.rotary_base),
        rotary_scaling_factor=_rotary_scaling_factor(model),
        rotary_interpolation=getattr(rotary, "seq_len_interpolation_factor", None),
        tied_embeddings=model.share_embeddings_and_output_weights,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        sliding_window=window,
        dtype=str(config.params_dtype).removeprefix("torch."),
    )


def transformer_config(
    architecture: Architecture, context: ParallelContext, *, dtype: torch.dtype
) -> Any:
    """Megatron-Core's ``TransformerConfig`` of the model in this layout.

    Fusions that need Apex, Transformer Engine or a compiler are off: the same numbers come
    out everywhere, and every linear layer stays visible to quantizers and scorers.
    """
    from megatron.core.transformer import TransformerConfig

    a = architecture
    window = None if a.sliding_window is None else (a.sliding_window - 1, 0)
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_epsilon,
        qk_layernorm=a.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        window_size=window,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=context.tp_size,
        pipeline_model_parallel_size=context.pp_size,
        context_parallel_size=context.cp_size,
        expert_model_parallel_size=context.ep_size,
        sequence_parallel=context.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _rotary_scaling_factor(model: Any) -> float | None:
    # Megatron-Core does not keep the factor; Llama 3's scaling divides the lowest frequency by it.
    if not model.rotary_scaling:
        return None
    dim = model.config.kv_channels
    unscaled: float = float(model.rotary_base) ** (-(dim - 2) / dim)
    lowest = float(model.rotary_pos_emb.inv_freq[-1])
    return round(unscaled / lowest, 3)


def _rotary_base(architecture: Architecture) -> float | int:
    base = architecture.rotary_base
    return int(base) if base.is_integer() else base


def _use_transformer_engine(layer_spec: LayerSpec, context: ParallelContext) -> bool:
    available = transformer_engine_available()
    if layer_spec == "transformer_engine" and not available:
        raise MissingDependencyError(
            "Transformer Engine is not installed",
            where="layer_spec",
            found=layer_spec,
            hint="pip install 'transformer-engine[pytorch]', or use layer_spec: local",
        )
    if context.cp_size > 1 and (layer_spec == "local" or not available):
        raise ParallelismError(
            "context parallelism needs Transformer Engine's attention",
            where="parallel.context_parallel_size",
            found=context.cp_size,
            allowed="1 without Transformer Engine",
        )
    if layer_spec == "auto":
        return available and context.device.type == "cuda"
    return layer_spec == "transformer_engine"


def _block_spec(architecture: Architecture, config: Any, use_te: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    if use_te:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
    layer = get_gpt_layer_local_spec(
        qk_layernorm=architecture.qk_norm, normalization=config.normalization
    )
    # Megatron-Core's wrapper of torch's norm refuses sequence parallelism.
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if architecture.qk_norm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm under Megatron-Core's constructor, fit for sequence parallelism.

    Marks its weight ``sequence_parallel``, as Transformer Engine's norm does, so that
    Megatron sums its gradient over the tensor-parallel processes.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet_construction() -> Iterator[None]:
    """Silences what Megatron-Core says of GPTModel and of fusions each time one is built."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
