"""Weights that ModelOpt's quantizers round, kept as the numbers of eight bits that they become."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.integrations.megatron_core import COMMON_STATE
from slimtron_common.integrations.modelopt_state import STATE_DIR, quiet_modelopt

__all__ = ["keep_codes", "weights_are_bytes"]

_LARGEST = {8: 127, (4, 3): 448}
"""ModelOpt's name of a format to the largest number that is scaled to."""


def keep_codes(model: nn.Module) -> None:
    """Keeps the quantized weights of a frozen model as INT8 or FP8, and makes them when needed.

    A layer's weight exists in the model's type while the layer computes, and is exactly what its
    quantizer would make of it. Weights of other formats, or whose quantizer does otherwise than
    scale and round, are kept rounded in the model's type.

    Args:
        model: With ModelOpt's quantizers. It cannot be trained or saved afterwards.
    """
    for module in model.modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        weight: Any = module._parameters.get("weight")
        if quantizer is None or weight is None or not quantizer.is_enabled:
            continue
        with torch.no_grad(), quiet_modelopt():
            rounded = quantizer(weight)
        scale = _scale(quantizer)
        quantizer.disable()
        codes = None if scale is None else _encode(rounded, scale, quantizer.num_bits)
        if scale is None or codes is None:
            weight.data = rounded
        else:
            _Codes(codes, scale).serve(module, weight)


def weights_are_bytes(directory: Path) -> bool:
    """Tells whether all quantized weights of a checkpoint are of formats that `keep_codes` packs.

    Args:
        directory: A Megatron distributed checkpoint.
    """
    file = directory / STATE_DIR / COMMON_STATE
    if not file.is_file():
        return False
    state = torch.load(file, map_location="cpu", weights_only=True)
    formats = [
        settings
        for mode, content in state["modelopt_state_dict"]
        if mode == "quantize"
        for name, settings in _entries(content["config"]["quant_cfg"])
        if "weight_quantizer" in name and settings.get("enable", True)
    ]
    return bool(formats) and all(
        _bits(settings.get("num_bits")) in _LARGEST and not settings.get("block_sizes")
        for settings in formats
    )


def _entries(config: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Patterns and settings of a config, which is a list from ModelOpt 0.44 on."""
    if isinstance(config, Mapping):
        return [(name, value) for name, value in config.items() if isinstance(value, Mapping)]
    return [(e["quantizer_name"], e["cfg"]) for e in config if isinstance(e["cfg"], Mapping)]


def _bits(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _scale(quantizer: Any) -> Tensor | None:
    """What a code is multiplied by, fp32; None for formats that are not packed."""
    largest = _LARGEST.get(_bits(quantizer.num_bits))
    amax = getattr(quantizer, "_amax", None)
    if largest is None or amax is None or quantizer.block_sizes:
        return None
    scale: Tensor = amax.detach().float() / largest
    return scale


def _encode(rounded: Tensor, scale: Tensor, bits: Any) -> Tensor | None:
    """Codes that `_decode` gives the very numbers of, but for their last bit; None without."""
    quotient = rounded.float() / torch.where(scale > 0, scale, 1.0)
    if bits == 8:
        codes = quotient.round().clamp(-128, 127).to(torch.int8)
    else:
        codes = quotient.clamp(-448, 448).to(torch.float8_e4m3fn)
    last_bit = torch.finfo(rounded.dtype).eps
    found = _decode(codes, scale, rounded.dtype)
    return codes if torch.allclose(found, rounded, rtol=2 * last_bit, atol=0.0) else None


def _decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale).to(dtype)


class _Codes:
    """One layer's weight in eight bits."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self._codes, self._scale = codes, scale

    def serve(self, module: nn.Module, weight: nn.Parameter) -> None:
        """Gives the weight to the layer whenever it computes."""
        nothing = weight.data.new_empty(0)

        def take(*_: Any) -> None:
            weight.data = _decode(self._codes, self._scale, nothing.dtype)

        def leave(*_: Any) -> None:
            weight.data = nothing

        leave()
        module.register_forward_pre_hook(take)
        module.register_forward_hook(leave, always_call=True)
