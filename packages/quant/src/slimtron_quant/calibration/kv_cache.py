"""Quantizers of keys and values: where they are attached, and the scales that they get."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_quant.formats.kv_cache import KV_QUANTIZERS, attentions

__all__ = ["check_kv_quantizers", "raise_kv_scales", "register_attention"]

_LISTED = 4


def register_attention() -> None:
    """Teaches ModelOpt to quantize keys and values in Megatron-Core's own attention.

    ModelOpt does so in Transformer Engine's alone, and leaves out others without a word. Affects
    models that are converted after it; does nothing the second time.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    from slimtron_common.models.context_attention import ContextParallelAttention

    for attention in (DotProductAttention, ContextParallelAttention):
        if attention not in QuantModuleRegistry:
            QuantModuleRegistry.register({attention: attention.__name__})(_quantized_attention())


def check_kv_quantizers(model: nn.Module) -> None:
    """Makes sure that the keys and values of every layer are quantized.

    Args:
        model: The bare Megatron-Core model with ModelOpt's quantizers.

    Raises:
        UnsupportedModelError: A layer's attention has no place for them.
    """
    bare = [
        f"layer {layer.layer_number - 1} ({_class_name(layer, attention)})"
        for layer, attention in attentions(model)
        if not all(getattr(getattr(attention, n, None), "is_enabled", False) for n in KV_QUANTIZERS)
    ]
    if bare:
        raise UnsupportedModelError(
            "the layer spec's attention has no place for quantizers of the KV cache",
            where="enable_kv_cache",
            found=", ".join(bare[:_LISTED]) + (", ..." if len(bare) > _LISTED else ""),
            allowed="core_attention by Megatron-Core's DotProductAttention or Transformer "
            "Engine's TEDotProductAttention",
            hint="load the model again with the local or the transformer_engine layer spec, or "
            "leave enable_kv_cache off",
        )


@torch.no_grad()
def raise_kv_scales(model: nn.Module) -> None:
    """Raises the scales of FP8 caches to 1 at least, as ModelOpt's export of Megatron models does.

    FP8 numbers are as fine with a scale of 1 as with a smaller one, unless almost all are below
    2**-6; with 1, numbers beyond those of the calibration text still fit, and engines that do
    not read the scales compute the same.

    Args:
        model: The bare Megatron-Core model, calibrated.
    """
    for _, attention in attentions(model):
        for name in KV_QUANTIZERS:
            quantizer: Any = getattr(attention, name, None)
            amax = getattr(quantizer, "_amax", None)
            if amax is not None and quantizer.is_enabled and quantizer.num_bits == (4, 3):
                amax.clamp_(min=quantizer.maxbound)


def _class_name(layer: Any, attention: Any) -> str:
    return type(layer.self_attention if attention is None else attention).__name__


def _quantized_attention() -> type:
    from megatron.core import parallel_state
    from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
    from modelopt.torch.utils.distributed import ParallelState

    class QuantDotProductAttention(QuantModule):  # type: ignore[misc]
        """Megatron-Core's attention with quantizers in front of its products."""

        def _setup(self) -> None:
            self.q_bmm_quantizer = TensorQuantizer()
            self.k_bmm_quantizer = TensorQuantizer()
            self.v_bmm_quantizer = TensorQuantizer()
            # ModelOpt makes the scales equal over these.
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
