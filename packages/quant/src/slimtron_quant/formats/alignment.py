"""Which layers of a model a format cannot hold, known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from slimtron_common.models import Architecture
from slimtron_common.models.layouts import Layout, QueryKeyValue
from slimtron_common.models.mapping import model_parameters
from slimtron_quant.formats.base import Format

__all__ = ["unfit_layers"]


def unfit_layers(
    fmt: Format,
    architecture: Architecture,
    *,
    block_size: int | None = None,
    tensor_parallel_size: int = 1,
) -> dict[str, str]:
    """Returns the linear layers that blocks do not divide, each with the reason.

    Blocks are counted where the weights are calibrated, in each process's part of a layer, and
    have to be blocks of the Hugging Face tensors, too.

    Args:
        fmt: The format.
        architecture: The whole model.
        block_size: Input channels in a block, in formats that leave it open.
        tensor_parallel_size: Processes that share a layer.

    Returns:
        Reasons by Megatron-Core module name (``decoder.layers.0.mlp.linear_fc2``), layers
        counted over all stages; of layers that are not to be quantized, too.
    """
    units = fmt.block_shape(block_size)
    unfit = {}
    for layer, rule in model_parameters(architecture):
        module = rule.names[0].format(layer=layer, expert=rule.expert).removesuffix(".weight")
        for shape in rule.hf_shapes:
            if layer is None or len(shape) != 2:
                continue
            reason = fmt.misfit(shape, block_size)
            for channels, size, unit in zip(
                ("output", "input"), _piece(rule.layout, shape, tensor_parallel_size), units,
                strict=True,
            ):  # fmt: skip
                if unit and size % unit:
                    reason = reason or f"blocks of {unit} on {size} {channels} channels in a piece"
            if reason:
                unfit[module] = reason
    return unfit


def _piece(layout: Layout, shape: Sequence[int], tensor_parallel_size: int) -> tuple[int, int]:
    """Output and input channels of a Hugging Face tensor that lie together in a process."""
    out_dim, in_dim = shape
    if isinstance(layout, QueryKeyValue):
        # Heads of queries, keys and values take turns.
        return layout.head_dim, in_dim
    if layout.dim == 0:
        return out_dim // tensor_parallel_size, in_dim
    return out_dim, in_dim // (tensor_parallel_size if layout.dim == -1 else 1)
