"""What becomes of the KV cache: keys, after their rotation, and values of all attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import QuantConfig, QuantizerEntry, named_config
from slimtron_quant.recipes.settings import Attributes, quantizer_settings

__all__ = ["KV_CACHE_QFORMATS", "KvCache", "kv_cache_in", "named_kv_cache"]

KV_CACHE_QFORMATS = ("fp8", "nvfp4")
"""Formats of a quantized KV cache."""

_CONFIGS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
_CODES: Mapping[str, Attributes] = {
    "fp8": {"num_bits": (4, 3)},
    "nvfp4": {
        "num_bits": (2, 1),
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    },
}
_CONSTANT = "use_constant_amax"
_DESCRIPTIVE = (_CONSTANT, "effective_bits")

_QUANTIZERS = ("k_bmm", "v_bmm")
# What some config of ModelOpt's may quantize beside these and the linear layers.
_ELSEWHERE = ("q_bmm", "p_bmm", "softmax", "output")
_LAYERS = (0, 10**6)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """A quantized KV cache."""

    qformat: str
    """One of ``KV_CACHE_QFORMATS``."""

    attributes: Attributes
    """Of ModelOpt's quantizers of keys and values."""

    @property
    def needs_calibration(self) -> bool:
        """Whether text has to run through the model for its scales."""
        return not self.attributes.get(_CONSTANT)

    @property
    def needs_cuda(self) -> bool:
        """Whether ModelOpt has only a CUDA kernel for it."""
        return self.qformat == "nvfp4"

    @property
    def entry(self) -> QuantizerEntry:
        """What switches it on in a config of ModelOpt's."""
        return QuantizerEntry("*[kv]_bmm_quantizer", self.attributes, enable=True)


def named_kv_cache(qformat: str) -> KvCache:
    """Returns ModelOpt's own settings of a format."""
    name = _CONFIGS[qformat]
    found = kv_cache_in(named_config(name), name=name, where="kv_cache_qformat")
    assert found is not None, "ModelOpt's config of the KV cache has a place for it"
    return found


def kv_cache_in(config: QuantConfig, *, name: str, where: str) -> KvCache | None:
    """Reads off a config what it does to the KV cache; None for nothing.

    Args:
        config: ModelOpt's.
        name: Of the recipe, for errors.
        where: The setting that holds it.

    Raises:
        ConfigError: It quantizes something of the attention that no checkpoint has a place for,
            or the cache in a way that inference engines do not know.
    """
    settings = {
        (quantizer, layer): quantizer_settings(config.entries, _probe(quantizer, layer))
        for quantizer in (*_QUANTIZERS, *_ELSEWHERE)
        for layer in _LAYERS
    }
    for (quantizer, _), found in settings.items():
        if found and quantizer in _ELSEWHERE:
            raise ConfigError(
                "it quantizes more than weights and inputs of linear layers and the KV cache, "
                "which has no place in a checkpoint",
                where=where,
                found=f"{name}: {quantizer}_quantizer",
                hint="take a config without it; a recipe file can hold the rest of this one",
            )
    cached = [found for (quantizer, _), found in settings.items() if quantizer in _QUANTIZERS]
    if any(found != cached[0] for found in cached) or _is_partial(config):
        raise ConfigError(
            "keys and values of all layers are cached in one format",
            where=where,
            found=f"{name}: {', '.join(e.pattern for e in config.entries if _is_cache(e))}",
            allowed="the pattern *[kv]_bmm_quantizer",
        )
    if not cached[0]:
        return None
    attributes = dict(cached[0][0])
    codes = {
        key: value
        for key, value in attributes.items()
        if key not in _DESCRIPTIVE and value is not None and value is not False
    }
    qformat = next((key for key, known in _CODES.items() if known == codes), None)
    if qformat is None or len(cached[0]) > 1:
        raise ConfigError(
            "no inference engine caches keys and values so",
            where=where,
            found=f"{name}: {codes}",
            allowed="; ".join(f"{key}: {dict(known)}" for key, known in _CODES.items()),
        )
    return KvCache(qformat=qformat, attributes=attributes)


def _probe(quantizer: str, layer: int) -> str:
    return f"decoder.layers.{layer}.self_attention.core_attention.{quantizer}_quantizer"


def _is_cache(entry: QuantizerEntry) -> bool:
    return "bmm" in entry.pattern and entry.enable is not False


def _is_partial(config: QuantConfig) -> bool:
    """Whether an entry is for the cache of some layers, or of none by its name in Megatron."""
    probes = [_probe(q, layer) for q in (*_QUANTIZERS, *_ELSEWHERE) for layer in _LAYERS]
    return any(
        not any(fnmatchcase(probe, entry.pattern) for probe in probes)
        for entry in config.entries
        if _is_cache(entry)
    )
