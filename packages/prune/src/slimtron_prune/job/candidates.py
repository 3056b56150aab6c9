"""Cut shapes into memory and measure them: what a search ranks by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimtron_common.checkpoint.weights import load_weights
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.models.megatron import LayerSpec, build_model
from slimtron_common.parallel import ParallelContext
from slimtron_prune.cutting import Cutter
from slimtron_prune.selection import Selection

__all__ = ["measure_selection", "shape_name"]


def measure_selection(
    selection: Selection,
    read: Callable[[str], Tensor],
    batches: Sequence[Tensor],
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    layer_spec: LayerSpec,
) -> Evaluation:
    """Builds what is selected, in this layout, and evaluates it.

    Args:
        selection: What is kept.
        read: Returns one of the source's tensors by its Hugging Face name.
        batches: This data-parallel rank's token ids.
        context: This process's place.
        dtype: Type to compute in.
        layer_spec: Whose layers to compute with.
    """
    target = selection.target
    model = build_model(target, context, dtype=dtype, layer_spec=layer_spec)
    load_weights(model, target, context, Cutter(selection).reader(read))
    name = shape_name(selection)
    return evaluate(model, batches, context, vocab_size=target.vocab_size, description=name)


def shape_name(selection: Selection) -> str:
    """Names a shape in a word, such as ``26L-576h-1536f-9q-3kv``."""
    a = selection.target
    parts = [
        f"{a.num_layers}L",
        f"{a.hidden_size}h",
        f"{a.ffn_hidden_size}f",
        f"{a.num_attention_heads}q",
        f"{a.num_query_groups}kv",
    ]
    if a.moe:
        parts.append(f"{a.moe.num_experts}e")
    return "-".join(parts)
