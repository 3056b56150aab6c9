"""The scales of the KV cache on disk, and what an engine computes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtron_quant.formats.codes import E4M3_MAX
from slimtron_quant.formats.kv_cache import KV_QUANTIZERS, KvCacheFormat, attentions

__all__ = ["KvCacheHook", "kv_cache_scales", "kv_scale_names"]


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Returns the names of the scales of keys and values.

    Args:
        layer: Counted from 0 over the whole model.
    """
    attention = f"model.layers.{layer}.self_attn"
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"


def kv_cache_scales(model: nn.Module) -> dict[str, Tensor]:
    """Returns the scales of this pipeline stage's caches by their names on disk.

    Args:
        model: The bare Megatron-Core model, calibrated; all tensor-parallel processes hold the
            same scales.

    Returns:
        Float32 scalars, the largest magnitude over the largest E4M3 number for both formats, as
        ModelOpt's Hugging Face export writes them and TensorRT-LLM reads them. (ModelOpt's
        export of Megatron models writes a sixth of it for NVFP4, as TensorRT-LLM once read it.)
        Empty where the cache is not quantized.
    """
    found = {}
    for layer, attention in attentions(model):
        for name, key in zip(kv_scale_names(layer.layer_number - 1), KV_QUANTIZERS, strict=True):
            quantizer: Any = getattr(attention, key, None)
            if quantizer is not None and quantizer.is_enabled:
                # One that was not calibrated has a constant scale.
                amax = getattr(quantizer, "_amax", None)
                largest = torch.tensor(E4M3_MAX) if amax is None else amax
                found[name] = largest.detach().float().reshape(()) / E4M3_MAX
    return found


class KvCacheHook:
    """Rounds keys and values before Megatron-Core's attention multiplies them."""

    def __init__(self, fmt: KvCacheFormat, key_scale: Tensor, value_scale: Tensor) -> None:
        self.format = fmt
        self.key_scale = key_scale
        self.value_scale = value_scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *rest = args
        key = self.format.round(key, self.key_scale)
        return (query, key, self.format.round(value, self.value_scale), *rest)
