"""An ``Architecture`` built as a Megatron-Core GPT."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from slimtron_common.errors import MissingDependencyError
from slimtron_common.integrations.megatron_core import (
    import_moe_utils,
    import_transformer_config,
)
from slimtron_common.models.adjustments import scale_embeddings, weight_expert_outputs
from slimtron_common.models.architecture import Activation, Architecture
from slimtron_common.models.megatron_hybrid import build_hybrid, hybrid_settings
from slimtron_common.models.norms import NORMS
from slimtron_common.models.recognition import architecture_of
from slimtron_common.parallel.context import ParallelContext

__all__ = [
    "LayerSpec",
    "architecture_of",
    "build_chunks",
    "build_model",
    "quiet_construction",
    "transformer_config",
    "transformer_engine_available",
]

LayerSpec = Literal["auto", "local", "transformer_engine"]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh's approximation."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Square of ReLU; Megatron-Core's own needs a compiler."""
    return F.relu(x).square()


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": gelu_tanh,
    "squared_relu": squared_relu,
}


def transformer_engine_available() -> bool:
    """Tells whether Transformer Engine is installed (not whether its kernels run here)."""
    return importlib.util.find_spec("transformer_engine") is not None


def build_model(
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    layer_spec: LayerSpec = "auto",
    settings: Mapping[str, Any] = MappingProxyType({}),
    vp_stage: int | None = None,
    layer: int | None = None,
) -> nn.Module:
    """Builds this process's part of the model, its weights uninitialised.

    Args:
        architecture: The model.
        context: This process's place.
        dtype: Type of the parameters.
        layer_spec: ``transformer_engine``'s modules, Megatron-Core's own (``local``), or
            ``auto``: Transformer Engine's on a GPU where it is installed.
        settings: More fields of ``TransformerConfig``, such as how a training recomputes
            activations.
        vp_stage: The chunk to build of an interleaved pipeline's stage.
        layer: The one layer to build, from 0, without pipeline parallelism: as a stage of its
            own. The first has the embedding, the last the final norm and the output layer.

    Returns:
        ``megatron.core.models.gpt.GPTModel``, or what ``build_hybrid`` builds, in eval mode on
        ``context.device``; its parameters require no gradient.

    Raises:
        ParallelismError: The model cannot be cut this way.
        MissingDependencyError: Transformer Engine was asked for and is not installed.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    architecture.check_parallel(
        tensor_parallel_size=context.tp_size,
        pipeline_parallel_size=context.pp_size,
        expert_parallel_size=context.ep_size,
        virtual_pipeline_size=context.vpp_size,
    )
    is_first = context.is_first_stage and vp_stage in (None, 0) and layer in (None, 0)
    is_last = (
        context.is_last_stage
        and vp_stage in (None, context.vpp_size - 1)
        and layer in (None, architecture.num_layers - 1)
    )
    use_te = _use_transformer_engine(layer_spec, context)
    config = transformer_config(architecture, context, dtype=dtype, settings=settings)
    if architecture.moe:
        import_moe_utils()
    model: Any
    with quiet_construction():
        if architecture.hybrid is not None:
            model = build_hybrid(
                architecture,
                config,
                context,
                use_transformer_engine=use_te,
                pre_process=is_first,
                post_process=is_last,
            )
        else:
            model = GPTModel(
                config=config,
                transformer_layer_spec=_block_spec(
                    architecture,
                    config,
                    use_te,
                    num_layers=get_num_layers_to_build(config, vp_stage) if layer is None else 1,
                ),
                vocab_size=architecture.padded_vocab_size(context.tp_size),
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=is_first,
                post_process=is_last,
                vp_stage=vp_stage,
                parallel_output=True,
                share_embeddings_and_output_weights=architecture.tied_embeddings,
                position_embedding_type="rope",
                rotary_percent=architecture.rotary_fraction,
                rotary_base=_rotary_base(architecture),
                rope_scaling=architecture.rotary_scaling_factor is not None,
                rope_scaling_factor=architecture.rotary_scaling_factor or 8.0,
                seq_len_interpolation_factor=architecture.rotary_interpolation,
            )
    if layer is not None:
        # Megatron-Core counts from the pipeline stage's first.
        model.decoder.layers[0].layer_number = layer + 1
    if architecture.scaled_embeddings and is_first:
        scale_embeddings(model.embedding)
    weight_expert_outputs(model)
    _mark_shards(model)
    model.requires_grad_(False)
    built: nn.Module = model.eval().to(context.device)
    return built


def build_chunks(
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    layer_spec: LayerSpec = "auto",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[nn.Module]:
    """Builds every chunk of this process's pipeline stage; ``build_model``'s arguments.

    Returns:
        One model as of ``build_model``, or ``context.vpp_size`` of them.
    """
    stages = range(context.vpp_size) if context.vpp_size > 1 else [None]
    return [
        build_model(
            architecture,
            context,
            dtype=dtype,
            layer_spec=layer_spec,
            settings=settings,
            vp_stage=stage,
        )
        for stage in stages
    ]


def transformer_config(
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Megatron-Core's ``TransformerConfig`` of the model in this layout.

    Fusions that need Apex, Transformer Engine or a compiler are off: the same numbers come
    out everywhere, and every linear layer stays visible to quantizers and scorers.
    """
    a = architecture
    moe: dict[str, Any] = {}
    if a.moe:
        moe = {
            "num_moe_experts": a.moe.num_experts,
            "moe_router_topk": a.moe.experts_per_token,
            "moe_ffn_hidden_size": a.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": a.moe.shared_ffn_hidden_size,
            # Softmax, then the choice; otherwise a softmax over the chosen, which sums to 1.
            "moe_router_pre_softmax": not a.moe.normalized,
            # Rounded logits would tie, and the layout of the processes decide.
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            # Unlike allgather, the processes need not hold batches of one size.
            "moe_token_dispatcher_type": "alltoall",
            # One module an expert, which quantizers see.
            "moe_grouped_gemm": False,
        }
        if a.moe.shared_ffn_hidden_size is not None:
            moe["moe_shared_expert_gate"] = True
    config_class = import_transformer_config()
    if unknown := moe.keys() - {field.name for field in dataclasses.fields(config_class)}:
        raise MissingDependencyError(
            "the installed Megatron-Core is too old for these experts",
            found=f"megatron-core {version('megatron-core')}, without {', '.join(unknown)}",
            hint="pip install 'megatron-core>=0.16'",
        )
    layout = None
    stages = a.stage_layers(context.pp_size)
    if len(set(stages)) > 1:
        layout = [["decoder"] * count for count in stages]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
    window = None if a.sliding_window is None else (a.sliding_window - 1, 0)
    return config_class(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.head_dim,
        normalization="LayerNorm" if a.normalization == "layernorm1p" else "RMSNorm",
        layernorm_zero_centered_gamma=a.normalization.endswith("1p"),
        layernorm_epsilon=a.norm_epsilon,
        qk_layernorm=a.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        gated_linear_unit=a.gated,
        activation_func=_ACTIVATIONS[a.activation],
        window_size=window,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=context.tp_size,
        pipeline_model_parallel_size=context.pp_size,
        pipeline_model_parallel_layout=layout,
        virtual_pipeline_model_parallel_size=context.vpp_size if context.vpp_size > 1 else None,
        # In a batch of messages, two stages would mix up forward and backward ones.
        overlap_p2p_comm=context.vpp_size > 1,
        batch_p2p_comm=context.vpp_size == 1,
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
        **moe,
        **(hybrid_settings(a.hybrid) if a.hybrid else {}),
        **settings,
    )


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
    if layer_spec == "auto":
        return available and context.device.type == "cuda"
    return layer_spec == "transformer_engine"


def _block_spec(architecture: Architecture, config: Any, use_te: bool, *, num_layers: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    num_experts = architecture.moe.num_experts if architecture.moe else None
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=architecture.qk_norm
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=architecture.qk_norm,
        normalization=config.normalization,
    )
    if config.context_parallel_size > 1:
        from slimtron_common.models.context_attention import ContextParallelAttention

        layer.submodules.self_attention.submodules.core_attention = ContextParallelAttention
    norm = NORMS[architecture.normalization]
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    if architecture.qk_norm:
        layer.submodules.self_attention.submodules.q_layernorm = norm
        layer.submodules.self_attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _mark_shards(model: nn.Module) -> None:
    """Marks weights that tensor parallelism cuts, for the norm of the gradient to count all parts.

    Megatron-Core's own layers do so only where they initialise them.
    """
    from megatron.core import tensor_parallel

    dims = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        dim = next((dim for kind, dim in dims.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "partition_dim"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)


@contextlib.contextmanager
def quiet_construction() -> Iterator[None]:
    """Silences what Megatron-Core says of GPTModel, of fusions and of its random numbers."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
