"""Keys and values in the precision of a quantized KV cache.

An inference engine stores keys, after their rotation, and values in FP8 or NVFP4. What it will
read is computed here by quantizers in front of the attention's products. ModelOpt puts them into
Transformer Engine's attention; this module teaches it Megatron-Core's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.integrations.modelopt import QuantizerEntry, named_config

__all__ = [
    "KV_CACHE_ALGORITHMS",
    "check_kv_cache_quantizers",
    "kv_cache_entries",
    "kv_cache_scales",
    "register_attention",
    "round_kv_cache",
]

KV_CACHE_ALGORITHMS: Mapping[str, str] = MappingProxyType({"fp8": "FP8", "nvfp4": "NVFP4"})
"""Format -> ``kv_cache_quant_algo``, by which inference engines know it."""

_CONFIGS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
_QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def kv_cache_entries(qformat: str) -> tuple[QuantizerEntry, ...]:
    """Returns what switches the quantizers of keys and values on, for a ModelOpt config."""
    return named_config(_CONFIGS[qformat]).entries


def register_attention() -> None:
    """Teaches ModelOpt to quantize keys and values in Megatron-Core's own attention.

    Affects models that are converted after it. Does nothing the second time.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    if DotProductAttention not in QuantModuleRegistry:
        QuantModuleRegistry.register({DotProductAttention: "DotProductAttention"})(
            _quantized_attention()
        )


def check_kv_cache_quantizers(model: nn.Module) -> None:
    """Makes sure that every layer's keys and values are quantized.

    Args:
        model: The bare Megatron-Core model with ModelOpt's quantizers.

    Raises:
        UnsupportedModelError: A layer's attention has no place for the quantizers.
    """
    bare = [
        f"layer {layer.layer_number} ({type(attention).__name__})"
        for layer, attention in _attentions(model)
        if not all(getattr(getattr(attention, n, None), "is_enabled", False) for n in _QUANTIZERS)
    ]
    if bare:
        raise UnsupportedModelError(
            "the attention has no place for quantizers of the KV cache",
            where="enable_kv_cache",
            found=", ".join(bare[:4]) + (", ..." if len(bare) > 4 else ""),
            allowed="attention by Megatron-Core's DotProductAttention or Transformer Engine's",
            hint="leave enable_kv_cache off",
        )


def kv_cache_scales(model: nn.Module) -> dict[str, Tensor]:
    """Returns the scales of this pipeline stage's caches under their names on disk.

    Args:
        model: The bare Megatron-Core model, calibrated; the scales are equal on all
            tensor-parallel processes.

    Returns:
        Names such as ``model.layers.0.self_attn.k_proj.k_scale`` with fp32 scalars: the largest
        magnitude over the largest FP8 number, for both formats, as ModelOpt writes it. Empty
        where the cache is not quantized.
    """
    found = {}
    for layer, attention in _attentions(model):
        for quantizer_name in _QUANTIZERS:
            quantizer = getattr(attention, quantizer_name, None)
            if quantizer is not None and quantizer.is_enabled:
                kind = quantizer_name[0]
                name = f"model.layers.{layer.layer_number - 1}.self_attn.{kind}_proj.{kind}_scale"
                found[name] = quantizer.amax.float().reshape(()) / _FP8_MAX
    return found


def round_kv_cache(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds keys or values as an FP8 cache does.

    Args:
        x: Keys or values, any shape and float dtype.
        scale: Scalar from disk.

    Returns:
        ``x`` as it is read back, in its own dtype.
    """
    codes = (x.float() * scale.reciprocal()).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def _attentions(model: Any) -> Iterator[tuple[Any, Any]]:
    for layer in model.decoder.layers:
        attention = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if attention is not None:
            yield layer, attention


def _quantized_attention() -> type:
    from megatron.core import parallel_state
    from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
    from modelopt.torch.utils.distributed import ParallelState

    class QuantDotProductAttention(QuantModule):  # type: ignore[misc]
        """Megatron-Core's attention with quantizers on its inputs."""

        def _setup(self) -> None:
            self.q_bmm_quantizer = TensorQuantizer()
            self.k_bmm_quantizer = TensorQuantizer()
            self.v_bmm_quantizer = TensorQuantizer()
            self.parallel_state = ParallelState(
                parallel_state.get_data_parallel_group(with_context_parallel=True),
                parallel_state.get_tensor_model_parallel_group(),
            )

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            return super().forward(
                self.q_bmm_quantizer(query),
                self.k_bmm_quantizer(key),
                self.v_bmm_quantizer(value),
                *args,
                **kwargs,
            )

    return QuantDotProductAttention
