from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export.quant_utils import get_quantization_format
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from slimtron_common.errors import ConfigError, UnsupportedModelError
from slimtron_common.integrations.modelopt import QuantizerEntry, named_config, to_modelopt
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, forward_only, initialize_parallel
from slimtron_quant.awq import AWQResult, awq_calibrate
from slimtron_quant.errors import CalibrationError

BLOCK_SIZE = 16
# ModelOpt says so wherever a process group exists and a layer is not Megatron's.
NO_PARALLEL_STATE = "ignore:Distributed training is initialized:UserWarning"


def config(name: str, *more: QuantizerEntry, algorithm: bool) -> dict[str, Any]:
    """A ModelOpt config with blocks that divide the small layers here."""
    # With "debug" ModelOpt keeps its losses.
    method = {"method": "awq_lite", "debug": True} if algorithm else None
    recipe = named_config(name).with_block_size(BLOCK_SIZE).with_algorithm(method)
    return to_modelopt(recipe.with_entries(QuantizerEntry("*output_layer*", enable=False), *more))


class Feedforward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.idle = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.nn.functional.silu(self.up(x)))
        return hidden


def feedforward(dtype: torch.dtype = torch.float32) -> Feedforward:
    torch.manual_seed(0)
    return Feedforward().to(dtype).eval()


def text(num_batches: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-1, 1.5, 64)[torch.randperm(64, generator=generator)]
    batches = torch.randn(num_batches, 2, 8, 64, generator=generator) * size
    return list(batches.to(dtype))


def loop_over(batches: list[Tensor]) -> Callable[[nn.Module], None]:
    def loop(model: nn.Module) -> None:
        for batch in batches:
            model(batch)

    return loop


def calibrated(
    model: nn.Module, batches: list[Tensor], name: str = "INT4_AWQ_CFG", **options: float
) -> AWQResult:
    mtq.quantize(model, config(name, algorithm=False))
    return awq_calibrate(model, loop_over(batches), **options)


def quantizer_attributes(model: nn.Module) -> dict[str, Any]:
    """What is set on every quantizer beside its buffers, comparable with ``==``."""
    # Traces of the forward passes that were run.
    traces = ("_input_dtype", "_calibrator", "_quantizer_cache")
    return {
        f"{name}.{key}": value.tolist() if isinstance(value, Tensor) else str(value)
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
        for key, value in vars(module).items()
        if key not in traces and key not in nn.Module().__dict__
    }


def assert_same_layer(ours: nn.Module, theirs: nn.Module) -> None:
    # The scale reaches the weight as 1 / (1 / s) in both, from means summed in fp64 in ours.
    def tensors(module: nn.Module) -> dict[str, Tensor]:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    torch.testing.assert_close(tensors(ours), tensors(theirs), rtol=1e-5, atol=1e-6)


@pytest.fixture
def megatron() -> Iterator[Callable[[], tuple[nn.Module, Callable[[Any], None]]]]:
    architecture = Architecture(
        family="llama",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        vocab_size=99,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
    )
    with initialize_parallel(ParallelConfig()) as context:

        def build() -> tuple[nn.Module, Callable[[Any], None]]:
            model = build_model(architecture, context, dtype=torch.float32)
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2, generator=generator)
                else:
                    parameter.uniform_(0.2, 3, generator=generator)
            batches = list(torch.randint(0, 99, (6, 2, 16), generator=generator))
            return model, lambda model: forward_only(model, batches, context)

        yield build


@pytest.mark.parametrize("name", ["INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"])
def test_megatron_model_ends_as_modelopt_leaves_it(megatron: Any, name: str) -> None:
    (ours, loop), (theirs, _) = megatron(), megatron()
    mtq.quantize(theirs, config(name, algorithm=True), loop)
    mtq.quantize(ours, config(name, algorithm=False))

    result = awq_calibrate(ours, loop)

    assert len(result.layers) == 8
    same = []
    for layer, scale in result.layers.items():
        reference = theirs.get_submodule(layer)
        losses = list(reference.awq_lite.loss.values())
        if name == "INT4_AWQ_CFG":
            # Theirs are means over the output of each of 6 batches; ratios are free of that.
            ratios = [loss / scale.losses[1] for loss in scale.losses[1:]]
            assert ratios == pytest.approx([loss / losses[0] for loss in losses], rel=1e-4)
        if scale.alpha == pytest.approx(reference.awq_lite.best_alpha):
            same.append(layer)
            assert_same_layer(ours.get_submodule(layer), reference)
    # With a sequence of quantizers ModelOpt searches with the first alone.
    assert len(same) >= (8 if name == "INT4_AWQ_CFG" else 5)
    assert quantizer_attributes(ours).keys() == quantizer_attributes(theirs).keys()
    if name == "INT4_AWQ_CFG":
        assert quantizer_attributes(ours) == quantizer_attributes(theirs)
    for layer in result.layers:
        formats = [get_quantization_format(m.get_submodule(layer)) for m in (ours, theirs)]
        assert formats[0] == formats[1] != None  # noqa: E711


@pytest.mark.filterwarnings(NO_PARALLEL_STATE)
def test_torch_model_ends_as_modelopt_leaves_it() -> None:
    ours, theirs, batches = feedforward(), feedforward(), text()
    mtq.quantize(theirs, config("INT4_AWQ_CFG", algorithm=True), loop_over(batches))

    result = calibrated(ours, batches)

    for layer in ("up", "down"):
        reference = theirs.get_submodule(layer)
        assert result.layers[layer].alpha == pytest.approx(reference.awq_lite.best_alpha)
        assert_same_layer(ours.get_submodule(layer), reference)
    for batch in batches:
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "INT8_DEFAULT_CFG"])
def test_reported_errors_are_those_of_the_model_that_runs(name: str, dtype: torch.dtype) -> None:
    model, batches = feedforward(dtype), text(dtype=dtype)
    original = {k: v.clone() for k, v in model.up.named_parameters()}

    result = calibrated(model, batches, name)

    scale = result.layers["up"]
    x = torch.cat(batches).flatten(0, 1).double()
    before = x @ original["weight"].double().T
    up = model.up
    weight = up.weight_quantizer(up.weight).double() * up.input_quantizer.pre_quant_scale.double()
    error = (x @ weight.T - before).square().sum() / before.square().sum()
    # Measured from bf16 weights in fp64: only the fp32 sums differ.
    assert scale.relative_error == pytest.approx(error.item(), rel=1e-4)
    assert scale.num_tokens == len(x)
    assert scale.signal == pytest.approx(before.square().sum().item() / len(x), rel=1e-4)
    assert len(scale.losses) == len(result.alphas) == 12
    assert result.alphas[scale.losses.index(min(scale.losses))] == scale.alpha


def test_quantized_output_is_closer_than_without_scales() -> None:
    model, plain, batches = feedforward(), feedforward(), text()
    expected = [model(batch) for batch in batches]
    mtq.quantize(plain, config("INT4_AWQ_CFG", algorithm=False))
    mtq.calibrate(plain, "max")

    calibrated(model, batches)

    def error(candidate: nn.Module) -> float:
        pairs = zip(batches, expected, strict=True)
        return sum((candidate(x) - y).square().sum().item() for x, y in pairs)

    assert error(model) < 0.9 * error(plain)


def test_the_text_runs_once_through_the_original_model() -> None:
    model, batches = feedforward(), text(2)
    expected = [model(batch) for batch in batches]
    seen: list[Tensor] = []

    def loop(model: nn.Module) -> None:
        seen.extend(model(batch) for batch in batches)

    mtq.quantize(model, config("W4A8_AWQ_BETA_CFG", algorithm=False))
    awq_calibrate(model, loop)

    assert len(seen) == len(batches)
    for output, reference in zip(seen, expected, strict=True):
        assert output.equal(reference)


def test_the_choice_does_not_depend_on_the_batches() -> None:
    whole, cut, batches = feedforward(), feedforward(), text()
    tokens = torch.cat(batches).flatten(0, 1)

    first = calibrated(whole, [tokens])
    second = calibrated(cut, list(tokens.split([1, 40, len(tokens) - 41])))

    for layer in ("up", "down"):
        assert first.layers[layer].alpha == second.layers[layer].alpha
        assert_same_layer(whole.get_submodule(layer), cut.get_submodule(layer))


def test_a_layer_without_tokens_stays_unscaled(caplog: pytest.LogCaptureFixture) -> None:
    model = feedforward()
    weight = model.idle.weight.clone()

    with caplog.at_level(logging.WARNING):
        result = calibrated(model, text(1))

    scale = result.layers["idle"]
    assert (scale.alpha, scale.num_tokens, scale.relative_error) == (None, 0, 0.0)
    assert model.idle.weight.equal(weight)
    assert model.idle.input_quantizer.pre_quant_scale.tolist() == [1.0] * 64
    assert model.idle.weight_quantizer.amax.numel() == weight.numel() // BLOCK_SIZE
    assert "no calibration token reached idle" in caplog.text


def test_a_weight_that_int4_holds_exactly_is_left_alone() -> None:
    model = feedforward()
    levels = torch.randint(-7, 8, model.up.weight.shape, generator=torch.Generator().manual_seed(0))
    levels[:, ::BLOCK_SIZE] = 7
    with torch.no_grad():
        model.up.weight.copy_(levels * 0.25)
    result = calibrated(model, text())
    assert result.layers["up"].alpha is None
    assert result.layers["up"].losses[0] == 0


def test_quantizer_state_can_be_restored() -> None:
    model, batches = feedforward(), text()
    calibrated(model, batches, "W4A8_AWQ_BETA_CFG")
    restored = mto.restore_from_modelopt_state(feedforward(), mto.modelopt_state(model))
    restored.load_state_dict(model.state_dict())
    assert restored(batches[0]).equal(model(batches[0]))


def test_dynamic_input_quantizers_are_left_as_they_are() -> None:
    model, batches = feedforward(), text()
    attributes = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
    per_token = QuantizerEntry("*input_quantizer", attributes, enable=True)
    mtq.quantize(model, config("INT4_AWQ_CFG", per_token, algorithm=False))
    awq_calibrate(model, loop_over(batches))
    assert model.up.input_quantizer.amax is None
    assert model.up.input_quantizer.is_enabled
    assert model(batches[0]).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    model = feedforward()
    mtq.quantize(model, config("INT4_AWQ_CFG", algorithm=False))
    model.train(training)
    modes = []
    awq_calibrate(model, lambda model: modes.append(model.training))
    assert modes == [False]
    assert model.training is training


@pytest.mark.parametrize("step", [0, -0.1, 1.5, math.nan])
def test_a_step_outside_the_range_is_refused(step: float) -> None:
    with pytest.raises(ConfigError, match="alpha_step"):
        awq_calibrate(feedforward(), loop_over([]), alpha_step=step)


def test_the_step_sets_the_candidates() -> None:
    assert calibrated(feedforward(), text(1), alpha_step=0.3).alphas == (None, 0.0, 0.3, 0.6, 0.9)


@pytest.mark.parametrize("name", ["INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    model, batches = feedforward(), text()
    batches[1][0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"up: the inputs hold NaN or infinity"):
        calibrated(model, batches, name)
    assert not model.up.input_quantizer._forward_pre_hooks
    assert model.up.input_quantizer.axis is None


def test_weights_that_are_not_finite_are_refused() -> None:
    model = feedforward()
    with torch.no_grad():
        model.down.weight[3, 5] = math.nan
    with pytest.raises(CalibrationError, match=r"down: the weights hold NaN or infinity"):
        calibrated(model, text())


def test_a_scaled_model_is_refused() -> None:
    model, batches = feedforward(), text(1)
    calibrated(model, batches)
    with pytest.raises(CalibrationError, match="already scaled"):
        awq_calibrate(model, loop_over(batches))


def test_inputs_quantized_in_blocks_are_refused() -> None:
    model = feedforward()
    attributes = {"num_bits": 8, "block_sizes": {-1: BLOCK_SIZE}}
    blocks = QuantizerEntry("*input_quantizer", attributes, enable=True)
    mtq.quantize(model, config("INT4_AWQ_CFG", blocks, algorithm=False))
    with pytest.raises(UnsupportedModelError, match=r"up\.input_quantizer"):
        awq_calibrate(model, loop_over(text(1)))
