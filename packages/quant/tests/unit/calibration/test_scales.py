from __future__ import annotations

import logging
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from slimtron_common.integrations.modelopt import named_config, to_modelopt
from slimtron_quant.calibration.scales import check_scales
from slimtron_quant.errors import CalibrationError
from slimtron_quant.formats import FORMATS, Calibration
from slimtron_quant.formats.base import SMALLEST_AMAX, VANISHING_AMAX

CONFIGS = [
    "FP8_DEFAULT_CFG",
    "INT8_DEFAULT_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4_AWQ_CFG",
    "W4A8_AWQ_BETA_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "MXFP8_DEFAULT_CFG",
]


def model_of(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64)).to(dtype)


def quantize(
    name: str, *, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
) -> Any:
    batch = torch.randn(16, 256, dtype=dtype)
    return mtq.quantize(
        model or model_of(dtype),
        to_modelopt(named_config(name)),
        None if name.startswith("MX") else lambda m: m(batch),
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sound_model_is_left_alone(name: str, dtype: torch.dtype) -> None:
    model = quantize(name, dtype=dtype)
    before = state(model)
    report = check_scales(model)
    assert report.mended == ()
    weights, inputs = 2, 2
    expected = {
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": weights,
        "INT4_AWQ_CFG": weights,
        "W4A8_AWQ_BETA_CFG": 2 * weights + inputs,
        "FP8_PER_CHANNEL_PER_TOKEN_CFG": weights,
        "MXFP8_DEFAULT_CFG": 0,
    }
    assert report.checked == expected.get(name, weights + inputs)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "fmt", "zero_scales"),
    [
        ("INT8_DEFAULT_CFG", "int8", 2),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4", 4),
    ],
)
def test_zero_weight_channels_are_mended_and_decode_to_zero(
    name: str, fmt: str, zero_scales: int, dtype: torch.dtype
) -> None:
    model = model_of(dtype)
    with torch.no_grad():
        model[0].weight[5:7] = 0  # type: ignore[index]
    model = quantize(name, dtype=dtype, model=model)
    other = model[1].weight_quantizer._amax.clone()
    report = check_scales(model)
    assert [(m.quantizer, m.elements) for m in report.mended] == [
        ("0.weight_quantizer", zero_scales)
    ]
    assert "zeros" in report.mended[0].reason
    quantizer = model[0].weight_quantizer
    assert quantizer._amax.min() == SMALLEST_AMAX
    assert torch.equal(model[1].weight_quantizer._amax, other)
    weight = quantizer(model[0].weight)
    assert bool((weight[5:7] == 0).all())
    calibration = Calibration(
        weight_amax=quantizer._amax, input_amax=torch.tensor(1.0), block_size=128
    )
    packed = FORMATS[fmt].pack(weight, calibration)
    decoded = FORMATS[fmt].unpack(packed, dtype=dtype, shape=(128, 256))
    assert bool((decoded[5:7] == 0).all())
    assert bool((packed["weight_scale"] >= torch.finfo(torch.float32).smallest_normal).all())
    assert check_scales(model).mended == ()


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
def test_an_input_of_zeros_gets_the_scale_one(name: str) -> None:
    model = model_of(torch.float32)
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[union-attr]
        model[0].bias.zero_()  # type: ignore[union-attr]
    model = quantize(name, model=model)
    report = check_scales(model)
    assert {m.quantizer for m in report.mended} == {"0.weight_quantizer", "1.input_quantizer"}
    quantizer = model[1].input_quantizer
    assert quantizer._amax == quantizer.maxbound
    # What arrives after all is not crushed to zero.
    assert quantizer(torch.tensor([[2.0]])) == 2.0


@pytest.mark.parametrize("tiny", [1e-9, VANISHING_AMAX, 1e-45])
def test_an_underflowing_amax_is_raised(tiny: float, caplog: pytest.LogCaptureFixture) -> None:
    model = quantize("INT8_DEFAULT_CFG")
    amax = model[0].weight_quantizer._amax
    amax[:3] = tiny
    model[1].input_quantizer._amax.fill_(tiny)
    with caplog.at_level(logging.WARNING):
        report = check_scales(model)
    assert [(m.quantizer, m.elements) for m in report.mended] == [
        ("0.weight_quantizer", 3),
        ("1.input_quantizer", 1),
    ]
    assert bool((amax[:3] == SMALLEST_AMAX).all())
    assert bool((amax[3:] > SMALLEST_AMAX).all())
    assert "0.weight_quantizer: amax was below" in caplog.text


@pytest.mark.parametrize(("name", "smallest"), [("FP8_DEFAULT_CFG", 2.0**-5),
                                                ("INT8_DEFAULT_CFG", 2.0**-7)])  # fmt: skip
def test_scales_stored_in_float16_are_kept_normal(name: str, smallest: float) -> None:
    model = quantize(name)
    amax = model[0].input_quantizer._amax
    amax.fill_(1e-3)
    report = check_scales(model, scale_dtype=torch.float16)
    assert [m.quantizer for m in report.mended] == ["0.input_quantizer"]
    assert amax == smallest
    scale = (amax / model[0].input_quantizer.maxbound).to(torch.float16)
    assert scale >= torch.finfo(torch.float16).smallest_normal


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1.0, "negative")]
)
@pytest.mark.parametrize("quantizer", ["weight_quantizer", "input_quantizer"])
def test_meaningless_amax_is_refused_by_name(quantizer: str, value: float, word: str) -> None:
    model = quantize("INT8_DEFAULT_CFG")
    getattr(model[1], quantizer)._amax.view(-1)[0] = value
    before = state(model)
    with pytest.raises(CalibrationError, match=f"1.{quantizer}: amax is {word} in 1 of") as error:
        check_scales(model)
    assert error.value.exit_code == 1
    after = state(model)
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def test_a_layer_that_saw_no_data_is_refused() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(256, 64)
            self.unused = nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.used(x)
            return output

    with pytest.raises(CalibrationError, match=r"unused\.input_quantizer: never saw data") as error:
        check_scales(quantize("FP8_DEFAULT_CFG", model=Router()))
    assert "used.input_quantizer" not in str(error.value).replace("unused", "")


def test_many_failures_are_counted_and_cut() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    model = quantize("INT8_DEFAULT_CFG", model=model)
    for layer in model:
        layer.input_quantizer._amax.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="left 12 quantizers") as error:
        check_scales(model)
    assert str(error.value.found).count("amax is NaN") == 8
    assert str(error.value.found).endswith("; ...")


@pytest.mark.parametrize(
    ("value", "word"),
    [(0.0, "zero"), (float("nan"), "NaN"), (float("inf"), "infinite"), (-1.0, "negative")],
)
@pytest.mark.parametrize("name", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG"])
def test_a_poisoned_pre_quant_scale_is_refused(name: str, value: float, word: str) -> None:
    model = quantize(name)
    # AWQ's input quantizer is off, and multiplies nevertheless.
    model[1].input_quantizer._pre_quant_scale[7] = value
    with pytest.raises(CalibrationError, match=f"1.input_quantizer: the pre-quant scale is {word}"):
        check_scales(model)


def test_quantizers_in_sequence_are_looked_at_one_by_one() -> None:
    model = quantize("W4A8_AWQ_BETA_CFG")
    model[0].weight_quantizer[1]._amax.zero_()
    report = check_scales(model)
    assert [m.quantizer for m in report.mended] == ["0.weight_quantizer.1"]
    model[0].weight_quantizer[0]._amax[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"0\.weight_quantizer\.0"):
        check_scales(model)


def test_disabled_quantizers_may_hold_anything() -> None:
    model = quantize("FP8_DEFAULT_CFG")
    model[0].input_quantizer._amax.fill_(torch.nan)
    model[0].input_quantizer.disable()
    assert check_scales(model).checked == 3
    assert check_scales(nn.Linear(4, 4)).checked == 0
