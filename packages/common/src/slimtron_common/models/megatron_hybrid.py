"""A hybrid of Mamba, attention and feed-forward layers built as Megatron-Core builds it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import nn

from slimtron_common.integrations.mamba import import_mamba_mixer
from slimtron_common.models.architecture import Architecture, Hybrid
from slimtron_common.models.norms import NORMS
from slimtron_common.parallel.context import ParallelContext

__all__ = ["build_hybrid", "hybrid_arguments", "hybrid_settings"]


def hybrid_settings(hybrid: Hybrid) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that only a hybrid has."""
    return {
        "is_hybrid_model": True,
        "mamba_num_heads": hybrid.mamba_num_heads,
        "mamba_head_dim": hybrid.mamba_head_dim,
        "mamba_num_groups": hybrid.mamba_num_groups,
        "mamba_state_dim": hybrid.mamba_state_dim,
    }


def build_hybrid(
    architecture: Architecture,
    config: Any,
    context: ParallelContext,
    *,
    use_transformer_engine: bool,
    pre_process: bool,
    post_process: bool,
) -> nn.Module:
    """Builds this process's part of a hybrid.

    Args:
        architecture: The model.
        config: Its ``TransformerConfig``.
        context: This process's place.
        use_transformer_engine: Whether layers are Transformer Engine's or Megatron-Core's own.
        pre_process: Whether the embedding belongs to this part.
        post_process: Whether the output layer does.

    Returns:
        Megatron-Core's ``HybridModel``, or its ``MambaModel`` before 0.19.
    """
    hybrid = architecture.hybrid
    assert hybrid is not None, "the model is a hybrid"
    import_mamba_mixer()
    name = "hybrid.hybrid_model" if _is_renamed() else "mamba"
    module = importlib.import_module(f"megatron.core.models.{name}")
    kind = module.HybridModel if _is_renamed() else module.MambaModel
    spec = _transformer_engine_spec() if use_transformer_engine else _local_spec(architecture)
    model: nn.Module = kind(
        config=config,
        vocab_size=architecture.padded_vocab_size(context.tp_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="none",
        **hybrid_arguments(spec, hybrid.pattern, context.pp_size),
    )
    return model


def hybrid_arguments(spec: Any, pattern: str, num_stages: int) -> dict[str, Any]:
    """What makes a hybrid of a layer spec and a pattern, by its names in this Megatron-Core.

    Args:
        spec: Of the stack of layers.
        pattern: A letter for each layer.
        num_stages: Pipeline stages, of equally many layers.
    """
    if not _is_renamed():
        return {"mamba_stack_spec": spec, "hybrid_override_pattern": pattern}
    count = len(pattern) // num_stages
    stages = [pattern[n : n + count] for n in range(0, len(pattern), count)]
    return {"hybrid_stack_spec": spec, "hybrid_layer_pattern": "|".join(stages)}


def _is_renamed() -> bool:
    return importlib.util.find_spec("megatron.core.models.hybrid") is not None


def _transformer_engine_spec() -> Any:
    if _is_renamed():
        return importlib.import_module(
            "megatron.core.models.hybrid.hybrid_layer_specs"
        ).hybrid_stack_spec
    return importlib.import_module("megatron.core.models.mamba.mamba_layer_specs").mamba_stack_spec


def _stack_classes() -> tuple[type[Any], type[Any]]:
    """The stack of layers and what its kinds of layers are given by."""
    if _is_renamed():
        module = importlib.import_module("megatron.core.models.hybrid.hybrid_block")
        return module.HybridStack, module.HybridStackSubmodules
    module = importlib.import_module("megatron.core.ssm.mamba_block")
    return module.MambaStack, module.MambaStackSubmodules


def _local_spec(architecture: Architecture) -> Any:
    """Layers of Megatron-Core's own modules, which it has no spec of."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    norm = NORMS[architecture.normalization]
    stack, submodules = _stack_classes()
    mamba = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=ModuleSpec(
                module=MambaMixer,
                submodules=MambaMixerSubmodules(
                    in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=DotProductAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    mlp = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return ModuleSpec(
        module=_with_final_norm(stack, norm),
        submodules=submodules(mamba_layer=mamba, attention_layer=attention, mlp_layer=mlp),
    )


def _with_final_norm(stack: type[Any], norm: type[nn.Module]) -> type[Any]:
    """A stack whose last norm is not Transformer Engine's."""

    class LocalStack(stack):  # type: ignore[misc]
        def __init__(self, config: Any, submodules: Any, **options: Any) -> None:
            super().__init__(config, submodules, post_layer_norm=False, **options)
            self.post_layer_norm = True
            if self.post_process:
                self.final_norm = norm(
                    config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
                )

    return LocalStack
