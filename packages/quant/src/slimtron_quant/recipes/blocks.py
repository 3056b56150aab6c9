"""The size of blocks of input channels that share a weight scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from slimtron_common.errors import ConfigError

if TYPE_CHECKING:
    from slimtron_common.models.linear import LinearLayer

__all__ = ["BLOCK_SIZES", "fitting_block_size"]

BLOCK_SIZES = (128, 64, 32, 16)
"""What ``auto`` tries, the coarsest first: fewer scales, fewer bits per weight. The kernels of the
inference engines know none above 128."""


def fitting_block_size(
    size: int | Literal["auto"],
    layers: Sequence[LinearLayer],
    tensor_parallel_size: int,
    *,
    where: str,
) -> int:
    """Returns the size of the blocks of one recipe.

    Args:
        size: The size asked for, or ``auto`` for the largest that fits.
        layers: The layers of the recipe.
        tensor_parallel_size: Processes that share a layer.
        where: The setting that holds ``size``.

    Raises:
        ConfigError: The size does not divide an input dimension, or with ``auto`` no size does.
    """
    dims = {layer.kind: layer.local_in_features(tensor_parallel_size) for layer in layers}
    fitting = [n for n in BLOCK_SIZES if not any(dim % n for dim in dims.values())]
    if size == "auto" and fitting:
        return fitting[0]
    wanted = BLOCK_SIZES[-1] if size == "auto" else size
    misfits = {kind: dim for kind, dim in dims.items() if dim % wanted}
    if not misfits:
        return wanted
    of_each = f" of each of {tensor_parallel_size} processes" if tensor_parallel_size > 1 else ""
    raise ConfigError(
        f"the block size must divide the input channels{of_each}: "
        + ", ".join(f"{kind} has {dim}" for kind, dim in misfits.items()),
        where=where,
        found=size,
        allowed=", ".join(map(str, fitting)) or "no size fits this model",
        hint=(
            "use auto for the largest that fits"
            if fitting
            else "exclude these layers, use fewer tensor-parallel processes, or take fp8"
        ),
    )
