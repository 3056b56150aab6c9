"""The output layer, apart from the model, so that the logits need not all exist at once."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

__all__ = ["linear_head", "output_head"]


def linear_head(model: Any) -> bool:
    """Tells whether a ``GPTModel``'s logits are the product of its last hidden states and a weight.

    Not so where something else happens to them (quantizers, adapters, scaling) or where other
    tokens are predicted besides. A chunk without an output layer has nothing that forbids it.
    """
    config = model.config
    if config.mtp_num_layers or getattr(config, "use_mup", False):
        return False
    if not model.post_process:
        return True
    # A quantized model's has quantizers, too, which are off as a rule.
    return isinstance(model.output_layer, ColumnParallelLinear) and not any(
        getattr(part, "is_enabled", True) for part in model.output_layer.children()
    )


def output_head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight ``[v/tp, h]`` and bias ``[v/tp]`` of a ``GPTModel``'s output layer, tied or not."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight(), model.output_layer.bias
    return model.output_layer.weight, model.output_layer.bias
