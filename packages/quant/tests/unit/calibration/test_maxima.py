from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from slimtron_common.integrations.modelopt import named_config, to_modelopt
from slimtron_quant.calibration.maxima import collecting_maxima


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    for parameter in layers.parameters():
        parameter.data.normal_(generator=generator)
    return layers


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (3, 1, 7)
    return [torch.randn(size, 5, 32, generator=generator) * size for size in sizes]


def run(layers: Any) -> None:
    for batch in batches():
        layers(batch)


def scales(layers: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in layers.state_dict().items() if "quantizer" in k}


@pytest.mark.parametrize(
    "name",
    ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "W4A8_AWQ_BETA_CFG"],
)
def test_scales_are_those_of_modelopt(name: str) -> None:
    config = to_modelopt(named_config(name).with_block_size(16))
    upstream = mtq.quantize(model(), copy.deepcopy(config), run)
    ours = mtq.quantize(model(), config, collecting_maxima(run))

    expected = scales(upstream)
    assert expected
    torch.testing.assert_close(scales(ours), expected, rtol=0, atol=0)
    x = batches()[0]
    torch.testing.assert_close(ours(x), upstream(x), rtol=0, atol=0)


def test_an_input_that_is_not_finite_is_left_to_the_check_of_the_scales() -> None:
    layers = model()

    def loop(layers: Any) -> None:
        layers(torch.full((2, 32), float("nan")))

    mtq.quantize(layers, mtq.FP8_DEFAULT_CFG, collecting_maxima(loop))
    assert layers[0].input_quantizer.amax.isnan()


def test_a_loop_that_fails_leaves_the_quantizers_collecting() -> None:
    layers = model()

    def loop(layers: Any) -> None:
        raise KeyError("no text")

    def observed(layers: nn.Module) -> None:
        with pytest.raises(KeyError, match="no text"):
            collecting_maxima(loop)(layers)
        # What ModelOpt had switched on is on again, and no hook is left behind.
        run(layers)

    mtq.quantize(layers, mtq.FP8_DEFAULT_CFG, observed)
    expected = mtq.quantize(model(), mtq.FP8_DEFAULT_CFG, run)
    torch.testing.assert_close(scales(layers), scales(expected), rtol=0, atol=0)
    assert not layers[0].input_quantizer._forward_pre_hooks
