"""Tell the format of a layer from the quantizers that ModelOpt gave it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from slimtron_common.errors import UnsupportedModelError

__all__ = ["LayerFormat", "detect_format", "quantizer_stages"]

_E4M3, _E2M1 = (4, 3), (2, 1)
_STATIC = ("type", "static")
_NVFP4_BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": _E4M3}
_MX_BLOCKS = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """How one linear layer is written."""

    name: str
    """Name of the format."""

    block_size: int | None = None
    """Input channels that share a scale, in formats that leave it open."""

    has_input_factor: bool = False
    """Whether the input is multiplied by a factor that was not folded away."""


_FORMATS: Mapping[tuple[str, str | None], str] = MappingProxyType(
    {
        ("fp8", "fp8"): "fp8",
        ("fp8 by channel", "fp8 by token"): "fp8_pc_pt",
        ("fp8 by 128 x 128", None): "block_fp8",
        ("int8 by channel", "int8"): "int8",
        ("int4 by block", None): "int4",
        ("int4 by block, then fp8", "fp8"): "w4a8_awq",
        ("nvfp4", "nvfp4"): "nvfp4",
        ("nvfp4", None): "w4a16_nvfp4",
        ("mxfp4", "mxfp4"): "mxfp4",
        ("mxfp8", "mxfp8"): "mxfp8",
    }
)
"""By what the quantizers of the weight and of the input compute."""


def detect_format(module: Any) -> LayerFormat | None:
    """Returns how a linear layer is written; None where its weight is as it was.

    Args:
        module: A linear layer, with or without ModelOpt's quantizers.

    Raises:
        UnsupportedModelError: The quantizers make up no format that can be written.
    """
    weight = getattr(module, "weight_quantizer", None)
    if weight is None or not weight.is_enabled:
        return None
    inputs = module.input_quantizer
    kinds = _kind(weight), _kind(inputs) if inputs.is_enabled else None
    name = _FORMATS.get(kinds)
    # An attribute with a value of None in ModelOpt 0.37, later absent.
    if name is None or getattr(weight, "svdquant_lora_a", None) is not None:
        raise UnsupportedModelError(
            "no format on disk holds what these quantizers compute",
            found=f"weights: {kinds[0]}; inputs: {kinds[1] or 'as they are'}",
            allowed="; ".join(f"{w} with inputs {i or 'as they are'}" for w, i in _FORMATS),
        )
    first = next(quantizer_stages(weight))
    return LayerFormat(
        name,
        first.block_sizes[-1] if first.num_bits == 4 else None,
        getattr(inputs, "pre_quant_scale", None) is not None,
    )


def quantizer_stages(quantizer: Any) -> Iterator[Any]:
    """The quantizers that a tensor goes through."""
    return iter(quantizer) if isinstance(quantizer, nn.Sequential) else iter([quantizer])


def _kind(quantizer: Any) -> str:
    """What a quantizer computes, in the words of ``_FORMATS`` where they have some."""
    return ", then ".join(map(_stage_kind, quantizer_stages(quantizer)))


def _stage_kind(quantizer: Any) -> str:
    bits, axis = quantizer.num_bits, quantizer.axis
    blocks = {k: v for k, v in (quantizer.block_sizes or {}).items() if (k, v) != _STATIC}
    if quantizer._dynamic:
        # ModelOpt turns the first into the second when it sees the first input.
        if bits == _E4M3 and (blocks == {-1: None} or (not blocks and axis is not None)):
            return "fp8 by token"
        return f"{bits} bits, scaled anew for each input, axis {axis}, blocks {blocks}"
    by_tensor = not blocks and axis is None
    by_channel = not blocks and axis in (0, (0,))
    kinds = {
        "fp8": bits == _E4M3 and by_tensor,
        "fp8 by channel": bits == _E4M3 and by_channel,
        "fp8 by 128 x 128": bits == _E4M3 and blocks == {-1: 128, -2: 128},
        "int8": bits == 8 and by_tensor,
        "int8 by channel": bits == 8 and by_channel,
        "int4 by block": bits == 4 and list(blocks) == [-1],
        "nvfp4": bits == _E2M1 and blocks == _NVFP4_BLOCKS,
        "mxfp4": bits == _E2M1 and blocks == _MX_BLOCKS,
        "mxfp8": bits == _E4M3 and blocks == _MX_BLOCKS,
    }
    found = (kind for kind, matches in kinds.items() if matches)
    return next(found, f"{bits} bits, axis {axis}, blocks {blocks}")
