"""How inference engines cache keys and values, and where a model's quantizers of them are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_common.models.architecture import Architecture
from slimtron_quant.formats import format_named
from slimtron_quant.formats.codes import E2M1_MAX

__all__ = [
    "KV_CACHE_FORMATS",
    "KV_QUANTIZERS",
    "KvCacheFormat",
    "attentions",
    "describe_kv_cache",
    "kv_cache_format",
    "kv_cache_format_announced",
]

KV_QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")
"""ModelOpt's names inside an attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheFormat:
    """A number format of the cache with one scale for a layer's keys and one for its values."""

    name: str
    quant_algo: str
    """``kv_cache_quant_algo`` in ``hf_quant_config.json``."""

    scheme: Mapping[str, Any] | str
    """``kv_cache_scheme`` in ``config.json``, as ModelOpt writes it."""

    num_bits: tuple[int, int]
    """Exponent and mantissa bits of ModelOpt's quantizer."""

    bits: float
    """Bits of a cached number, scales of blocks included."""

    codes_per_scale: float = 1.0
    """Largest code of a number, where the scale on disk is that of the scales of its blocks."""

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """Rounds keys or values to what is read back from the cache.

        Args:
            x: ``[..., head_dim]``, any float type.
            scale: Scalar from disk, float32.

        Returns:
            The same shape and type.
        """
        return format_named(self.name).quantize_activation(x, scale / self.codes_per_scale)


KV_CACHE_FORMATS: Mapping[str, KvCacheFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            KvCacheFormat(
                name="fp8",
                quant_algo="FP8",
                scheme={"dynamic": False, "num_bits": 8, "type": "float"},
                num_bits=(4, 3),
                bits=8,
            ),
            KvCacheFormat(
                name="nvfp4",
                quant_algo="NVFP4",
                scheme="NVFP4",
                num_bits=(2, 1),
                # An 8-bit scale for each 16.
                bits=4.5,
                codes_per_scale=E2M1_MAX,
            ),
        )
    }
)


def kv_cache_format_announced(quant_algo: str | None) -> KvCacheFormat | None:
    """Returns the format that a checkpoint announces; None for a cache that is not quantized.

    Raises:
        CheckpointError: It is none of ``KV_CACHE_FORMATS``.
    """
    if quant_algo is None:
        return None
    found = next((f for f in KV_CACHE_FORMATS.values() if f.quant_algo == quant_algo), None)
    if found is None:
        raise CheckpointError(
            "the KV cache is of no known format",
            where="kv_cache_quant_algo",
            found=quant_algo,
            allowed=", ".join(f.quant_algo for f in KV_CACHE_FORMATS.values()),
        )
    return found


def describe_kv_cache(fmt: KvCacheFormat | None, architecture: Architecture, itemsize: int) -> str:
    """Says what the cache of a token takes.

    Args:
        fmt: The cache's format; None for the type that the model computes in.
        architecture: The whole model.
        itemsize: Bytes of a number of that type.
    """
    numbers = 2 * architecture.num_layers * architecture.num_query_groups * architecture.head_dim
    before = f"{numbers * itemsize:,} bytes a token"
    if fmt is None:
        return f"as it was, {before}"
    return f"{fmt.name}, {numbers * fmt.bits / 8:,.0f} where there were {before}"


def attentions(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yields this pipeline stage's attention layers with what multiplies queries and keys.

    Args:
        model: The bare Megatron-Core model.

    Yields:
        A layer of the decoder and its core attention, None where the layer attends without one.
    """
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in model.decoder.layers:
        attention = getattr(layer, "self_attention", None)
        # Layers of other kinds and pruned ones have nothing to cache.
        if attention is not None and not isinstance(attention, IdentityOp):
            yield layer, getattr(attention, "core_attention", None)


def kv_cache_format(model: Any) -> KvCacheFormat | None:
    """Returns the format that a model's quantizers round keys and values to; None for none.

    Args:
        model: The bare Megatron-Core model, all of its caches in one format.
    """
    for _, attention in attentions(model):
        quantizer = getattr(attention, KV_QUANTIZERS[0], None)
        if quantizer is not None and quantizer.is_enabled:
            bits = quantizer.num_bits
            return next(f for f in KV_CACHE_FORMATS.values() if f.num_bits == bits)
    return None
