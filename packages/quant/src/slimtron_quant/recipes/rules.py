"""What some models ask for, whatever the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtron_common.integrations.modelopt import QuantConfig
from slimtron_common.models.architecture import Architecture
from slimtron_quant.recipes.settings import linear_settings, method_of

__all__ = ["SMALLEST_INPUT_SCALE", "with_model_rules"]

SMALLEST_INPUT_SCALE = 0.01
"""Smallest scale of the inputs of a model with squared ReLU, see
``calibration.floors.floor_input_scales``."""

# TensorRT-LLM's W4A8 kernels overflow on these with the factors of AWQ's fine search; one step
# leaves it the choice between a full factor and none.
_COARSE_AWQ_FAMILIES = ("gemma", "mpt")


def with_model_rules(config: QuantConfig, architecture: Architecture) -> QuantConfig:
    """Returns one of Slimtron's recipes adjusted to the model.

    What a recipe file sets stays. SmoothQuant on Gemma needs no rule: ``sq_alpha`` starts from
    the 0.5 that Gemma 7B needs.
    """
    probe = linear_settings(config, "decoder.layers.0.mlp.linear_fc1")
    is_w4a8 = (probe.weight_bits, probe.activation_bits) == (4, 8)
    if is_w4a8 and method_of(config) == "awq_lite" and architecture.family in _COARSE_AWQ_FAMILIES:
        settings: Mapping[str, Any] = (
            config.algorithm if isinstance(config.algorithm, Mapping) else {"method": "awq_lite"}
        )
        return config.with_algorithm({"alpha_step": 1, **settings})
    return config
