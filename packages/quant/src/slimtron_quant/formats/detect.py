"""Tell the format of a layer from the quantizers that ModelOpt gave it."""

from __future__ import annotations

from typing import Any

from slimtron_common.errors import UnsupportedModelError

__all__ = ["detect_format"]


def detect_format(module: Any) -> tuple[str, int | None] | None:
    """Returns a linear layer's format name and block size; None where its weight is as it was.

    Args:
        module: A linear layer, with or without ModelOpt's quantizers.

    Raises:
        UnsupportedModelError: The quantizers make up no format that can be written.
    """
    weight = getattr(module, "weight_quantizer", None)
    if weight is None or not weight.is_enabled:
        return None
    quantizes_input = module.input_quantizer.is_enabled
    blocks = {k: v for k, v in (weight.block_sizes or {}).items() if isinstance(k, int)}
    if weight.num_bits == (4, 3) and not blocks and weight.axis is None and quantizes_input:
        return "fp8", None
    if weight.num_bits == 8 and not blocks and weight.axis in (0, (0,)) and quantizes_input:
        return "int8", None
    if weight.num_bits == 4 and list(blocks) == [-1] and not quantizes_input:
        return "int4", blocks[-1]
    raise UnsupportedModelError(
        "no format on disk holds what these quantizers compute",
        found=f"weights of {weight.num_bits} bits, axis {weight.axis}, blocks {blocks}, inputs "
        f"{'quantized' if quantizes_input else 'as they are'}",
    )
