"""What a job cannot do with one layer at a time in memory."""

from __future__ import annotations

from collections.abc import Sequence

from slimtron_common.errors import ConfigError, ParallelismError
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.recipes import Scheme

__all__ = ["check_layerwise"]

_METHODS = (None, "max", "smoothquant", "awq_lite")
"""The algorithms that look at each layer by itself, on the activations of the original model."""


def check_layerwise(config: QuantJobConfig, schemes: Sequence[Scheme]) -> None:
    """Refuses what takes more of the model than a layer.

    Args:
        config: The job, with ``layerwise``.
        schemes: What it does to the model.

    Raises:
        ConfigError: An export format, a search or an algorithm that needs all layers.
        ParallelismError: Pipeline parallelism, which has all layers in memory.
    """
    stages = config.parallel.pipeline_parallel_size
    if stages > 1:
        raise ParallelismError(
            "one layer at a time leaves nothing to share out to pipeline stages",
            where="parallel.pipeline_parallel_size",
            found=stages,
            allowed="1 with --layerwise",
            hint="raise tensor_parallel_size, or start more data-parallel processes",
        )
    if config.export.export_format != "hf":
        raise ConfigError(
            "a distributed checkpoint is written from the whole model",
            where="export.export_format",
            found=config.export.export_format,
            allowed="hf with --layerwise",
        )
    if config.mixed.is_on and config.mixed.sensitivity is None:
        raise ConfigError(
            "sensitivity is measured on the whole model",
            where="mixed.sensitivity",
            found=None,
            allowed="a sensitivity.json with --layerwise",
            hint="measure once where the model fits, and give the sensitivity.json of that output",
        )
    for scheme in schemes:
        if scheme.method not in _METHODS:
            raise ConfigError(
                "the recipe's algorithm is not known to look at each layer by itself",
                where="quantization.algorithm",
                found=scheme.method,
                allowed=", ".join(str(m or "none") for m in _METHODS) + " with --layerwise",
            )
