"""How a checkpoint announces its quantization to inference engines.

Two files say it: ``hf_quant_config.json`` in ModelOpt's first layout, which every engine
reads, and ``quantization_config`` inside ``config.json`` in its later one, which newer vLLM
prefers. TensorRT-LLM warns where the two differ, so the second is made from the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from slimtron_common.errors import ConfigError
from slimtron_quant.formats import format_named
from slimtron_quant.formats.detect import LayerFormat
from slimtron_quant.formats.kv_cache import KvCacheFormat

__all__ = ["config_json_quantization", "hf_quant_config"]

Layers = Mapping[str, LayerFormat | None]


def hf_quant_config(layers: Layers, kv_cache: KvCacheFormat | None = None) -> dict[str, Any]:
    """Returns the content of ``hf_quant_config.json``.

    Args:
        layers: For every linear layer of the model, ``lm_head`` too: its Hugging Face module
            name with how it is written, or None where it is not quantized.
        kv_cache: Format of the KV cache; None where it is not quantized.

    Raises:
        ConfigError: Nothing is quantized.
    """
    quantized = {name: layer for name, layer in layers.items() if layer}
    has_factors = any(layer.has_input_factor for layer in quantized.values())
    settings = {
        name: format_named(layer.name).settings(layer.block_size, has_input_factors=has_factors)
        for name, layer in quantized.items()
    }
    if not settings and kv_cache is None:
        raise ConfigError("every layer is excluded: nothing is quantized", where="exclude")
    # vLLM refuses a checkpoint without an algorithm for weights, which is what ModelOpt
    # writes for a KV cache alone. One from which every module is excluded says the same to all.
    first, *others = settings.values() or [format_named("fp8").settings()]
    # Names in full: engines also look for them inside longer names, where "layers.1" would be
    # found in "layers.10".
    excluded = sorted(name for name, layer in layers.items() if not layer) if settings else ["*"]
    quantization: dict[str, Any] = {
        "kv_cache_quant_algo": None if kv_cache is None else kv_cache.quant_algo,
        "exclude_modules": excluded,
    }
    if all(other == first for other in others):
        quantization |= first
    else:
        quantization |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": settings}
    producer = {"name": "modelopt", "version": version("nvidia-modelopt")}
    return {"producer": producer, "quantization": quantization}


def config_json_quantization(
    layers: Layers, kv_cache: KvCacheFormat | None = None
) -> dict[str, Any]:
    """Returns ``quantization_config`` for ``config.json``, saying what ``hf_quant_config`` says.

    Args:
        layers: As ``hf_quant_config`` takes them.
        kv_cache: As well.
    """
    file = hf_quant_config(layers, kv_cache)
    quantization = file["quantization"]
    groups: dict[tuple[str, int | None], list[str]] = {}
    for name, layer in layers.items():
        if layer:
            groups.setdefault((layer.name, layer.block_size), []).append(name)
    uniform = "quantized_layers" not in quantization
    config = {
        "quant_method": "modelopt",
        "quant_algo": quantization["quant_algo"],
        "ignore": quantization["exclude_modules"],
        "producer": file["producer"],
        "config_groups": {
            f"group_{i}": {
                **format_named(name).scheme(block_size),
                "targets": ["Linear"] if uniform else sorted(members),
            }
            for i, ((name, block_size), members) in enumerate(groups.items())
        },
    }
    for key in ("group_size", "has_zero_point", "pre_quant_scale", "quantized_layers"):
        if key in quantization:
            config[key] = quantization[key]
    if kv_cache is not None:
        scheme = kv_cache.scheme
        config["kv_cache_scheme"] = scheme if isinstance(scheme, str) else dict(scheme)
    return config
