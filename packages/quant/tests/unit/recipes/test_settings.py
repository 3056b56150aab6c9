"""Reading a config must agree with what ModelOpt makes of it."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
from torch import nn

from slimtron_common.integrations.modelopt import (
    QuantConfig,
    QuantizerEntry,
    config_names,
    named_config,
    to_modelopt,
)
from slimtron_quant.recipes.settings import linear_settings

NAMES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "router")


def model() -> nn.Module:
    layer = nn.Module()
    for name in NAMES:
        *parents, leaf = name.split(".")
        holder = layer
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(leaf, nn.Linear(2, 2))
    return layer


def stages(quantizer: Any) -> list[Any]:
    if not quantizer.is_enabled:
        return []
    return list(quantizer) if isinstance(quantizer, nn.Sequential) else [quantizer]


def quantizes_layers(name: str) -> bool:
    return any(linear_settings(named_config(name), module).weight for module in NAMES)


@pytest.mark.parametrize("name", list(filter(quantizes_layers, config_names())))
def test_agrees_with_modelopt(name: str) -> None:
    config = named_config(name)
    quantized = mtq.quantize(model(), to_modelopt(config.with_algorithm(None)))
    for module in NAMES:
        settings = linear_settings(config, module)
        for kind, found in (("weight", settings.weight), ("input", settings.inputs)):
            quantizer = quantized.get_submodule(f"{module}.{kind}_quantizer")
            assert len(found) == len(stages(quantizer)), (module, kind)
            for attributes, stage in zip(found, stages(quantizer), strict=True):
                assert stage.num_bits == attributes.get("num_bits", 8)
                assert (stage.block_sizes or None) == (attributes.get("block_sizes") or None)


def test_later_entries_win_and_switches_keep_attributes() -> None:
    config = QuantConfig(
        (
            QuantizerEntry("*weight_quantizer", {"num_bits": 4}),
            QuantizerEntry("*fc1*", enable=False),
            QuantizerEntry("*.0.fc1*", enable=True),
            QuantizerEntry("*input_quantizer", {"num_bits": 8, "type": "dynamic"}),
            QuantizerEntry("*", enable=False, parent_class="nn.LeakyReLU"),
        )
    )
    assert linear_settings(config, "layers.0.fc1").weight == ({"num_bits": 4},)
    assert linear_settings(config, "layers.1.fc1").weight == ()
    assert linear_settings(config, "layers.1.fc2").weight == ({"num_bits": 4},)
    assert linear_settings(config, "layers.1.fc2").activation_bits == 8
    assert not linear_settings(config, "layers.1.fc2").needs_calibration
    assert linear_settings(config, "layers.1.fc2").needs_maxima
