"""Write a quantized Megatron model as a Hugging Face directory for inference engines.

The layout is ModelOpt's unified checkpoint, which vLLM, SGLang and TensorRT-LLM read. ModelOpt
0.47's own export of Megatron models writes half tensors at tensor-parallel sizes above 1 and
leaves out the factors of AWQ; here every tensor is gathered whole before it is packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.checkpoint.base import CONFIG_NAME
from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.checkpoint.weights import (
    BoundParameter,
    bound_parameters,
    gather_shards,
    stage_tensors,
)
from slimtron_common.checkpoint.writer import copy_files, write_safetensors
from slimtron_common.errors import VerificationError
from slimtron_common.models import Architecture
from slimtron_common.models.huggingface import config_from_architecture
from slimtron_common.models.layouts import Layout
from slimtron_common.models.mapping import model_parameters
from slimtron_common.parallel import ParallelContext
from slimtron_common.parallel.schedule import LayeredModel
from slimtron_quant.export.folding import input_factor
from slimtron_quant.export.kv_cache import kv_cache_scales
from slimtron_quant.formats import Calibration, Format, format_named
from slimtron_quant.formats.codes import block_amax
from slimtron_quant.formats.detect import LayerFormat, detect_format, quantizer_stages
from slimtron_quant.formats.hf_quant_config import config_json_quantization, hf_quant_config
from slimtron_quant.formats.kv_cache import KvCacheFormat, kv_cache_format

__all__ = ["QUANT_CONFIG_NAME", "write_huggingface"]

QUANT_CONFIG_NAME = "hf_quant_config.json"

_OFF_BY_A_STEP = 0.01
"""Share of the weights that may be a step off in formats with two levels of scales: kernels
divide approximately, and a number half-way between two codes goes either way."""


def write_huggingface(
    directory: Path,
    model: nn.Module | LayeredModel,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    companions: Sequence[Path] = (),
) -> None:
    """Fills an existing directory; every process calls it.

    Args:
        directory: On storage that all processes share.
        model: The bare Megatron-Core model with calibrated quantizers, prepared for the export;
            or the like in layers.
        architecture: What it is.
        context: This process's place.
        dtype: Type of what stays unquantized.
        companions: Tokenizer files to copy along.

    Raises:
        UnsupportedModelError: A layer's quantizers have no format on disk.
    """
    found: dict[str, LayerFormat | None] = {}
    caches: list[KvCacheFormat | None] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for part in model.layers() if isinstance(model, LayeredModel) else iter([model]):
            found.update(_linear_layers(part, architecture))
            caches.append(kv_cache_format(part))
            yield from _packed_tensors(part, architecture, context, dtype=dtype)
            # Before the next one loads.
            del part

    write_safetensors(directory, tensors(), context)
    layers, kv_cache = _in_order(context.joined(found), architecture), caches[0]
    if context.is_main:
        name = str(dtype).removeprefix("torch.")
        config = config_from_architecture(architecture, dtype=name)
        config["quantization_config"] = config_json_quantization(layers, kv_cache)
        write_json(directory / CONFIG_NAME, config)
        write_json(directory / QUANT_CONFIG_NAME, hf_quant_config(layers, kv_cache))
        copy_files(companions, directory)
    context.barrier()


def _linear_layers(
    model: nn.Module, architecture: Architecture
) -> Iterator[tuple[str, LayerFormat | None]]:
    """This process's linear layers by their Hugging Face names, with their formats."""
    for bound in bound_parameters(model, architecture):
        if _is_linear(bound) and not bound.is_copy:
            for name in bound.rule.hf_names:
                yield name, detect_format(_module(model, bound))


def _in_order(
    found: Mapping[str, LayerFormat | None], architecture: Architecture
) -> dict[str, LayerFormat | None]:
    """All linear modules in the order of the model."""
    names = (name for _, rule in model_parameters(architecture) for name in rule.hf_names)
    layers = {name.removesuffix(".weight"): found[name] for name in names if name in found}
    # Engines look the output layer up even where it is the embedding.
    layers.setdefault("lm_head", None)
    return layers


@torch.no_grad()
def _packed_tensors(
    model: nn.Module, architecture: Architecture, context: ParallelContext, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    kv_scales = kv_cache_scales(model)

    def convert(bound: BoundParameter) -> Iterator[tuple[str, Tensor]]:
        module = _module(model, bound)
        attention, _, query = bound.rule.hf_names[0].rpartition("q_proj.weight")
        if attention and not query:
            yield from ((n, scale) for n, scale in kv_scales.items() if n.startswith(attention))
        written = detect_format(module) if _is_linear(bound) else None
        if written is not None:
            yield from _packed_layer(bound, module, written, context, dtype=dtype)
            return
        wholes = bound.rule.layout.split(gather_shards(bound.tensor.detach(), context))
        for name, whole in zip(bound.rule.hf_names, wholes, strict=True):
            yield name, whole.to(dtype)

    parameters = [b for b in bound_parameters(model, architecture) if not b.is_copy]
    yield from stage_tensors(parameters, convert, context)


def _packed_layer(
    bound: BoundParameter,
    module: Any,
    written: LayerFormat,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    fmt, layout = format_named(written.name), bound.rule.layout
    block_shape = fmt.block_shape(written.block_size)
    stages = list(quantizer_stages(module.weight_quantizer))
    # Rounding twice changes nothing: the rounded weight packs to the codes that it decodes from.
    rounded = stages[0](bound.tensor).detach()
    weights = expected = layout.split(gather_shards(rounded, context))
    if len(stages) > 1:
        # Decoding goes through the later ones.
        final = module.weight_quantizer(bound.tensor).detach()
        expected = layout.split(gather_shards(final, context))
    amaxes = _whole(_weight_amax(fmt, block_shape, bound.tensor, stages[0]), layout, context,
                    block_shape, len(weights))  # fmt: skip
    factor = input_factor(module)
    if layout.dim == -1:
        if factor is None and fmt.always_stores_input_factor:
            factor = torch.ones_like(rounded[0])
        if factor is not None:
            factor = torch.cat(gather_shards(factor, context))
    inputs = module.input_quantizer
    # Experts are packed where they lie, and sent to the writer.
    is_needed = context.is_writer if bound.rule.expert is None else context.tp_rank == 0
    if not is_needed:
        return
    for name, weight, decoded, weight_amax in zip(
        bound.rule.hf_names, weights, expected, amaxes, strict=True
    ):
        calibration = Calibration(
            weight_amax=weight_amax,
            tensor_amax=stages[-1]._amax if fmt.has_two_levels else None,
            input_amax=getattr(inputs, "_amax", None) if inputs.is_enabled else None,
            # TensorRT-LLM wants it in the model's type; the tensors of a file share no memory.
            input_factor=None if factor is None else factor.to(dtype, copy=True),
            block_size=written.block_size,
        )
        tensors = fmt.pack(weight, calibration)
        _check_codes(name, fmt, tensors, decoded)
        for suffix, tensor in tensors.items():
            yield f"{name.removesuffix('weight')}{suffix}", tensor


def _check_codes(name: str, fmt: Format, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
    decoded = fmt.unpack(tensors, dtype=weight.dtype, shape=weight.shape)
    expected = weight.float()
    difference = (decoded - expected).abs()
    # A code times its scale is rounded once more than ModelOpt's value.
    tolerance = 2 * torch.finfo(weight.dtype).eps
    off = difference > tolerance * expected.abs() + 1e-30
    if fmt.has_two_levels and off.float().mean() <= _OFF_BY_A_STEP:
        step = expected.abs() / 8 + expected.abs().max() * 2.0**-17
        off = difference > step * (1 + tolerance)
    if bool(off.any()):
        raise VerificationError(
            "packing the weight changed it",
            where=name,
            found=f"a difference of {float(difference.max()):.3g}",
            allowed=f"relative {tolerance:.1g}",
            hint="please report this as a bug",
        )


def _weight_amax(
    fmt: Format, block_shape: tuple[int | None, int | None], weight: Tensor, quantizer: Any
) -> Tensor:
    """Largest magnitudes ``[rows, blocks]`` of this process's part, one row where all share it."""
    height, width = block_shape
    if fmt.takes_amax_from_weight:
        assert width is not None
        return block_amax(weight, width)
    amax: Tensor = quantizer._amax
    if height is None:
        return amax.reshape(1, -1)
    rows = weight.shape[0]
    return amax.reshape(-(-rows // height), -1).repeat_interleave(height, 0)[:rows]


def _whole(
    amax: Tensor,
    layout: Layout,
    context: ParallelContext,
    block_shape: tuple[int | None, int | None],
    count: int,
) -> Sequence[Tensor]:
    """Largest magnitudes of the whole layer, for each Hugging Face tensor in it."""
    shards = gather_shards(amax, context)
    if layout.dim is not None and block_shape[layout.dim] is not None:
        return layout.split(shards)
    # One scale for all processes: calibration has made it the same on each.
    return [shards[0]] * count


def _is_linear(bound: BoundParameter) -> bool:
    return bound.tensor.dim() == 2 and not bound.name.startswith("embedding.")


def _module(model: nn.Module, bound: BoundParameter) -> Any:
    return model.get_submodule(bound.name.rpartition(".")[0])
