"""Models quantized by ModelOpt's own configs, written, and read back without ModelOpt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.checkpoint.weights import bound_parameters
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.errors import CheckpointError, VerificationError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.versions import needs
from slimtron_quant import calibration_loop
from slimtron_quant.errors import CalibrationError
from slimtron_quant.export.kinds import write_export
from slimtron_quant.export.reader import ExportedModel

pytestmark = needs("nvidia-modelopt", "0.47", what="backends for quantizers")

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "block_fp8": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a16_nvfp4": "W4A16_NVFP4_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
E2M1 = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])
"""Numbers of even code first: they win where two are as near."""
WEIGHT_ONLY = ["block_fp8", "int4", "w4a16_nvfp4"]
DTYPES = [torch.float32, torch.bfloat16]

Batches = list[Tensor]


def emulated(x: Tensor, quantizer: Any) -> Tensor:
    """What ModelOpt's kernels for blocks compute on a GPU; it has none for the CPU."""
    blocks = x.float().unflatten(-1, (-1, quantizer.block_sizes[-1]))
    amax = blocks.abs().amax(-1, keepdim=True)
    largest = 448 if quantizer.num_bits == (4, 3) else 6
    if quantizer.block_sizes["scale_bits"] == (8, 0):
        step = 2.0 ** torch.ceil(torch.log2(amax / largest)).clamp(min=-127)
    else:
        scale = quantizer._amax.float() / (6 * 448)
        step = (amax / (6 * scale)).clamp(max=448).to(torch.float8_e4m3fn).float() * scale
    scaled = blocks / torch.where(step > 0, step, 1)
    if quantizer.num_bits == (4, 3):
        numbers = scaled.to(torch.float8_e4m3fn).float()
    else:
        numbers = E2M1[(scaled.abs()[..., None] - E2M1).abs().argmin(-1)].copysign(scaled)
    return torch.where(step > 0, numbers * step, 0).flatten(-2).to(x.dtype)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        register_quant_backend,
        unregister_quant_backend,
    )

    register_quant_backend("emulated", emulated)
    with initialize_parallel(device="cpu") as context:
        yield context
    unregister_quant_backend("emulated")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models") / "whole_blocks"
    return open_checkpoint(f"hf:{write_tiny_model(folder, tokenizer=False, **SHAPE)}")


@pytest.fixture(scope="module")
def batches() -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (2, 32), generator=generator) for _ in range(2)]


@pytest.fixture
def quantized(
    checkpoint: Checkpoint, context: ParallelContext, batches: Batches
) -> Callable[..., nn.Module]:
    def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = build_model(checkpoint.architecture, context, dtype=dtype, layer_spec="local")
        checkpoint.load(model, context)
        config = copy.deepcopy(getattr(mtq, CONFIGS[name]))
        for entry in config["quant_cfg"]:
            blocks = (entry.get("cfg") or {}) if isinstance(entry.get("cfg"), dict) else {}
            if (blocks.get("block_sizes") or {}).get("type") == "dynamic":
                blocks["backend"] = "emulated"
        off = [{"quantizer_name": "*output_layer*", "enable": False}]
        config["quant_cfg"] = [*config["quant_cfg"], *off]
        mtq.quantize(model, {**config, "algorithm": None})
        mtq.calibrate(model, "max", calibration_loop(batches, context))
        return model

    return build


@pytest.fixture
def written(
    checkpoint: Checkpoint, context: ParallelContext, tmp_path: Path
) -> Callable[..., ExportedModel]:
    def export(model: nn.Module, dtype: torch.dtype = torch.float32) -> ExportedModel:
        with collective_directory(tmp_path / "out", context, overwrite=True) as directory:
            write_export("hf", directory, model, checkpoint.architecture, context, dtype=dtype)
        return ExportedModel(tmp_path / "out")

    return export


@pytest.fixture
def logits(context: ParallelContext, batches: Batches) -> Callable[[nn.Module], Tensor]:
    def run(model: nn.Module) -> Tensor:
        found: list[Tensor] = []
        forward_only(model, batches[:1], context, lambda _, x: found.append(x.float().clone()))
        return found[0]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_files_hold_the_model_in_memory(
    name, dtype, quantized, written, logits, checkpoint, context
) -> None:
    model = quantized(name, dtype)
    exported = written(model, dtype)
    assert {fmt.name for fmt in exported.formats.values()} == {name}
    assert len(exported.formats) == 7
    exported.check_values()
    # Between its two roundings ModelOpt rounds to the type of the weight, which engines do not.
    allowed = (0.001 if dtype == torch.float32 else 0.03) if name == "w4a8_awq" else 0
    reloaded = exported.build(context, dtype=dtype)
    for memory, disk in zip(
        bound_parameters(model, checkpoint.architecture),
        bound_parameters(reloaded, checkpoint.architecture),
        strict=True,
    ):
        module: Any = model.get_submodule(memory.name.rpartition(".")[0])
        expected = memory.tensor
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled:
            expected = module.weight_quantizer(memory.tensor)
        off = ~torch.isclose(disk.tensor, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert off.float().mean() <= allowed, memory.name
    found, wanted = logits(reloaded), logits(model)
    # Where inputs are rounded a half-way one that goes the other way moves what follows.
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.05 if name not in WEIGHT_ONLY else 1e-4
    assert float((found - wanted).norm() / wanted.norm()) < tolerance
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", ["fp8_pc_pt", "mxfp4", "mxfp8", "nvfp4"])
def test_reloaded_inputs_are_rounded(name, quantized, written, context, logits) -> None:
    """Without the hooks the reloaded model would be another one."""
    exported = written(quantized(name))
    reloaded = exported.build(context, dtype=torch.float32)
    rounded = logits(reloaded)
    for module in reloaded.modules():
        module._forward_pre_hooks.clear()
    change = float((logits(reloaded) - rounded).norm() / rounded.norm())
    assert change > 1e-3


@pytest.mark.parametrize("name", ["nvfp4", "w4a8_awq", "int4"])
def test_factors_are_folded_or_written_in_the_type_of_the_model(
    name, quantized, written, context, logits
) -> None:
    model = quantized(name)
    for layer in model.decoder.layers:
        for module in (layer.self_attention.linear_qkv, layer.mlp.linear_fc2):
            factor = torch.linspace(0.5, 2, module.weight.shape[1])
            quantizer = module.input_quantizer
            quantizer._enable_pre_quant_scale = True
            quantizer.pre_quant_scale = factor
            module.weight.data /= factor
            for stage in module.weight_quantizer.modules():
                if hasattr(stage, "reset_amax") and hasattr(stage, "num_bits"):
                    stage.reset_amax()
                    stage.disable_quant()
                    stage.enable_calib()
            module.weight_quantizer(module.weight)
            for stage in module.weight_quantizer.modules():
                if hasattr(stage, "reset_amax") and hasattr(stage, "num_bits"):
                    stage.load_calib_amax()
                    stage.enable_quant()
                    stage.disable_calib()
    exported = written(model, torch.bfloat16)
    factors = {key for key in exported.tensors.names if key.endswith("pre_quant_scale")}
    # TensorRT-LLM asks for one in every row-parallel layer of the integer formats.
    always = set() if name == "nvfp4" else {"model.layers.0.self_attn.o_proj.pre_quant_scale"}
    assert factors == {"model.layers.0.mlp.down_proj.pre_quant_scale"} | always
    for key in factors:
        assert exported.tensors.read(key).dtype == torch.bfloat16
    algo = exported.quantization["quant_algo"]
    assert algo == {"nvfp4": "NVFP4_AWQ", "w4a8_awq": "W4A8_AWQ", "int4": "W4A16_AWQ"}[name]
    # The model in memory multiplies by what was written.
    reloaded = exported.build(context, dtype=torch.float32)
    hooks = [h for m in reloaded.modules() for h in m._forward_pre_hooks.values()]
    kept = [h.factor for h in hooks if h.factor is not None and h.factor.shape == (512,)]
    in_memory = model.decoder.layers[0].mlp.linear_fc2.input_quantizer.pre_quant_scale
    if name == "int4":
        # The up projection has a scale for every output channel and took it.
        assert in_memory is None
        assert torch.equal(kept[0].float(), torch.ones(512))
    else:
        assert torch.equal(kept[0].float(), in_memory.float())


def test_wrong_codes_are_not_written(quantized, written, monkeypatch, tmp_path) -> None:
    model = quantized("nvfp4")
    module = model.decoder.layers[0].mlp.linear_fc2
    forward = type(module.weight_quantizer).forward

    def one_block_too_large(self: Any, x: Tensor) -> Tensor:
        y = forward(self, x)
        if self is module.weight_quantizer:
            y = y.clone()
            y[0, :16] *= 1.5
        return y

    monkeypatch.setattr(type(module.weight_quantizer), "forward", one_block_too_large)
    with pytest.raises(VerificationError, match=r"down_proj\.weight"):
        written(model)
    assert not (tmp_path / "out").exists()


def test_heads_that_share_a_block_are_refused(context, batches, tmp_path) -> None:
    shape = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    checkpoint = open_checkpoint(
        f"hf:{write_tiny_model(tmp_path / 'model', tokenizer=False, **shape)}"
    )
    model = build_model(checkpoint.architecture, context, dtype=torch.float32, layer_spec="local")
    checkpoint.load(model, context)
    mtq.quantize(model, copy.deepcopy(mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG))
    with pytest.raises((CalibrationError, CheckpointError), match="calibrated apart"):
        write_export("hf", tmp_path, model, checkpoint.architecture, context, dtype=torch.float32)
