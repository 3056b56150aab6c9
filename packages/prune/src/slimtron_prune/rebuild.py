"""Turn a Megatron-Core model in memory into a smaller one, in the layout that it has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimtron_common.checkpoint.weights import BoundParameter, bound_parameters, gather_shards
from slimtron_common.errors import ParallelismError
from slimtron_common.models import Architecture
from slimtron_common.models.adjustments import scale_embeddings, weight_expert_outputs
from slimtron_common.models.architecture import Hybrid
from slimtron_common.models.mapping import Parameter, model_parameters
from slimtron_common.models.megatron import quiet_construction
from slimtron_common.models.megatron_hybrid import hybrid_arguments
from slimtron_common.parallel import ParallelContext
from slimtron_prune.cutting import Cutter
from slimtron_prune.selection import Selection

__all__ = ["check_stages", "shrink_model"]


@torch.no_grad()
def shrink_model(model: Any, selection: Selection, context: ParallelContext) -> None:
    """Makes a model the target of a selection, in place: whoever holds it holds the smaller one.

    All processes call it. Layers stay on the pipeline stages that they are on.

    Args:
        model: A bare ``GPTModel`` or hybrid, at any tensor and pipeline size.
        selection: What is kept of it.
        context: This process's place.

    Raises:
        ParallelismError: A pipeline stage would have no layer, or the processes that share
            experts out would not have equally many.
    """
    stages = check_stages(model, selection, context)
    shards = dict(_cut_shards(model, selection, context))
    parameter = next(model.parameters())
    requires_grad = any(p.requires_grad for p in model.parameters())
    _update_config(model.config, selection.target, stages)
    first = sum(stages[: context.pp_rank])
    smaller = (
        _build(model, selection, first, stages[context.pp_rank])
        if selection.target.hybrid is None
        else _build_hybrid(model, selection.target.hybrid, context.pp_size)
    )
    smaller.to(device=parameter.device, dtype=parameter.dtype).requires_grad_(requires_grad)
    smaller.train(model.training)
    # Whoever holds the object keeps it, and it keeps its own hooks.
    vars(model).update({k: v for k, v in vars(smaller).items() if "_hooks" not in k})
    for bound in bound_parameters(model, selection.target):
        # In the type that each has: Megatron-Core keeps some of a Mamba layer in float32.
        bound.tensor.data = shards.pop(bound.rule.hf_names[0])


def check_stages(model: Any, selection: Selection, context: ParallelContext) -> list[int]:
    """Counts the layers that each pipeline stage keeps.

    Raises:
        ParallelismError: As ``shrink_model``.
    """
    source, target = selection.source.moe, selection.target.moe
    if context.ep_size > 1 and source != target:
        raise ParallelismError(
            "experts are pruned layer by layer, and the processes that share them out would not "
            "have equally many",
            where="expert_model_parallel_size",
            found=context.ep_size,
            allowed="1 for a model in memory",
            hint="prune the checkpoint with `slimtron-prune run`",
        )
    own = [layer.layer_number - 1 for layer in model.decoder.layers]
    kept = sum(number in selection.layers for number in own)
    stages: list[Any] = [None] * context.pp_size
    dist.all_gather_object(stages, kept, group=context.pp_group)
    if 0 in stages:
        raise ParallelismError(
            "a pipeline stage would have no layer left",
            where=f"pipeline stage {stages.index(0)}",
            found=f"{stages} layers",
            hint="prune at a smaller pipeline size: a checkpoint opens in any layout",
        )
    if selection.source.hybrid is not None and len(set(stages)) > 1:
        raise ParallelismError(
            "the pipeline stages of a hybrid have equally many layers",
            where="pipeline stages",
            found=f"{stages} layers",
            hint="prune at a smaller pipeline size, or drop as many layers of each stage",
        )
    return stages


def _cut_shards(
    model: Any, selection: Selection, context: ParallelContext
) -> Iterator[tuple[str, Tensor]]:
    """Yields this process's part of each smaller parameter, by its first tensor's name."""
    cutter = Cutter(selection)
    present = {b.rule.hf_names[0]: b for b in bound_parameters(model, selection.source)}
    for _, rule in model_parameters(selection.target):
        bound = present.get(cutter.cuts[rule.hf_names[0]].of)
        if bound is not None:
            yield rule.hf_names[0], _cut_shard(bound, rule, cutter, context)


def _cut_shard(
    bound: BoundParameter, rule: Parameter, cutter: Cutter, context: ParallelContext
) -> Tensor:
    whole = bound.rule.layout.split(gather_shards(bound.tensor.detach(), context))
    read = cutter.reader(dict(zip(bound.rule.hf_names, whole, strict=True)).__getitem__)
    shard = rule.layout.merge(
        [read(name) for name in rule.hf_names], context.tp_rank, context.tp_size
    )
    # Not a view of the whole, which is to go.
    return shard.clone()


def _update_config(config: Any, target: Architecture, stages: list[int]) -> None:
    a = target
    config.kv_channels = a.head_dim
    config.num_layers, config.hidden_size = a.num_layers, a.hidden_size
    config.num_attention_heads, config.num_query_groups = a.num_attention_heads, a.num_query_groups
    if a.moe is None:
        config.ffn_hidden_size = a.ffn_hidden_size
    else:
        config.moe_ffn_hidden_size, config.num_moe_experts = a.ffn_hidden_size, a.moe.num_experts
        config.moe_shared_expert_intermediate_size = a.moe.shared_ffn_hidden_size
    if a.hybrid is not None:
        config.mamba_num_heads = a.hybrid.mamba_num_heads
        config.mamba_head_dim = a.hybrid.mamba_head_dim
    config.num_layers_in_first_pipeline_stage = config.num_layers_in_last_pipeline_stage = None
    config.account_for_embedding_in_pipeline_split = False
    config.account_for_loss_in_pipeline_split = False
    config.pipeline_model_parallel_layout = None
    if len(set(stages)) > 1:
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        layout = [["decoder"] * count for count in stages]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(layout, len(stages))


def _build(model: Any, selection: Selection, first: int, count: int) -> Any:
    """Builds a stage of the smaller model as the larger one was built, its weights undefined."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    submodules = model.decoder.submodules
    kept = [
        spec
        for layer, spec in zip(model.decoder.layers, submodules.layer_specs, strict=True)
        if layer.layer_number - 1 in selection.layers
    ]
    with _without_initialization(model.config), quiet_construction():
        smaller = type(model)(
            config=model.config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=kept, layer_norm=submodules.layer_norm
            ),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_sequence_length,
            pre_process=model.pre_process,
            post_process=model.post_process,
            fp16_lm_cross_entropy=model.fp16_lm_cross_entropy,
            parallel_output=model.parallel_output,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            rope_scaling=model.rotary_scaling,
            pg_collection=model.pg_collection,
            vp_stage=model.vp_stage,
        )
    # It depends on the width of a head alone, and the model does not tell its factors.
    smaller.rotary_pos_emb = model.rotary_pos_emb
    assert [layer.layer_number for layer in smaller.decoder.layers] == list(
        range(first + 1, first + count + 1)
    ), "Megatron-Core numbers the layers over all stages"
    if selection.source.scaled_embeddings and model.pre_process:
        scale_embeddings(smaller.embedding)
    weight_expert_outputs(smaller)
    return smaller


def _build_hybrid(model: Any, hybrid: Hybrid, num_stages: int) -> Any:
    spec = getattr(model, "hybrid_stack_spec", None) or model.mamba_stack_spec
    names = (
        *("config", "vocab_size", "max_sequence_length", "pre_process", "post_process"),
        *("fp16_lm_cross_entropy", "parallel_output", "share_embeddings_and_output_weights"),
        *("position_embedding_type", "pg_collection"),
    )
    with _without_initialization(model.config), quiet_construction():
        return type(model)(
            **{name: getattr(model, name) for name in names},
            **hybrid_arguments(spec, hybrid.pattern, num_stages),
        )


@contextlib.contextmanager
def _without_initialization(config: Any) -> Iterator[None]:
    before = config.perform_initialization
    config.perform_initialization = False
    try:
        yield
    finally:
        config.perform_initialization = before
