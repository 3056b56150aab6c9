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
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.checkpoint.base import CONFIG_NAME
from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.checkpoint.weights import BoundParameter, bound_parameters, gather_shards
from slimtron_common.checkpoint.writer import (
    collective_directory,
    copy_files,
    write_safetensors,
)
from slimtron_common.errors import VerificationError
from slimtron_common.models import Architecture
from slimtron_common.models.huggingface import config_from_architecture
from slimtron_common.models.mapping import Layout
from slimtron_common.parallel import ParallelContext
from slimtron_quant.export.folding import fold_input_factors, input_factor
from slimtron_quant.formats import Format, format_named
from slimtron_quant.formats.detect import detect_format
from slimtron_quant.formats.hf_quant_config import config_json_quantization, hf_quant_config

__all__ = ["QUANT_CONFIG_NAME", "export_huggingface", "write_huggingface"]

QUANT_CONFIG_NAME = "hf_quant_config.json"


def export_huggingface(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    companions: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes the directory whole or not at all; every process calls it.

    Args:
        path: The directory to create, on storage that all processes share.
        model: The bare Megatron-Core model with calibrated quantizers.
        architecture: What it is.
        context: This process's place.
        dtype: Type of what stays unquantized.
        companions: Tokenizer files to copy along.
        overwrite: Whether an existing directory is replaced.

    Raises:
        CheckpointError: The directory exists or cannot be written.
        UnsupportedModelError: A layer's quantizers have no format on disk.
    """
    with collective_directory(path, context, overwrite=overwrite) as directory:
        write_huggingface(
            directory, model, architecture, context, dtype=dtype, companions=companions
        )


def write_huggingface(
    directory: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    companions: Sequence[Path] = (),
) -> None:
    """Writes into an existing directory; otherwise as ``export_huggingface``.

    Factors that can be are folded into the norms of ``model`` first.
    """
    fold_input_factors(model, architecture, dtype=dtype)
    layers = _quantized_layers(model, architecture, context)
    write_safetensors(
        directory, _packed_tensors(model, architecture, context, dtype=dtype), context
    )
    if context.is_main:
        name = str(dtype).removeprefix("torch.")
        config = config_from_architecture(architecture, dtype=name)
        config["quantization_config"] = config_json_quantization(layers)
        write_json(directory / CONFIG_NAME, config)
        write_json(directory / QUANT_CONFIG_NAME, hf_quant_config(layers))
        copy_files(companions, directory)
    context.barrier()


def _quantized_layers(
    model: nn.Module, architecture: Architecture, context: ParallelContext
) -> dict[str, tuple[str, int | None] | None]:
    """Each linear layer's Hugging Face name with its format, over all pipeline stages."""
    local = {}
    for bound in bound_parameters(model, architecture):
        if _is_linear(bound) and not bound.is_copy:
            for name in bound.rule.hf_names:
                local[name.removesuffix(".weight")] = detect_format(_module(model, bound))
    stages: list[dict[str, tuple[str, int | None] | None]] = [{}] * context.pp_size
    dist.all_gather_object(stages, local, group=context.pp_group)
    layers = {name: spec for stage in stages for name, spec in stage.items()}
    # Engines look the output layer up even where it is the embedding.
    layers.setdefault("lm_head", None)
    return layers


@torch.no_grad()
def _packed_tensors(
    model: nn.Module, architecture: Architecture, context: ParallelContext, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for bound in bound_parameters(model, architecture):
        if bound.is_copy:
            continue
        module = _module(model, bound)
        spec = detect_format(module) if _is_linear(bound) else None
        if spec is not None:
            yield from _packed_layer(bound, module, spec, context)
            continue
        wholes = bound.rule.layout.split(gather_shards(bound.tensor.detach(), context))
        for name, whole in zip(bound.rule.hf_names, wholes, strict=True):
            yield name, whole.to(dtype)


def _packed_layer(
    bound: BoundParameter, module: Any, spec: tuple[str, int | None], context: ParallelContext
) -> Iterator[tuple[str, Tensor]]:
    layout, (format_name, block_size) = bound.rule.layout, spec
    # Rounding twice changes nothing: the rounded weight packs to the codes that it decodes from.
    rounded = module.weight_quantizer(bound.tensor).detach()
    amax = module.weight_quantizer._amax
    amax = amax.reshape(rounded.shape[0], -1) if amax.numel() > 1 else amax.reshape(1, 1)
    weights = layout.split(gather_shards(rounded, context))
    amaxes = _whole(amax, layout, context, len(weights))
    factor = None
    if layout.dim == -1:
        factor = input_factor(module)
        if factor is None and format_name == "int4":
            # TensorRT-LLM reads one for these layers whether AWQ ran or not.
            factor = torch.ones_like(rounded[0])
        if factor is not None:
            factor = torch.cat(gather_shards(factor, context))
    input_amax = module.input_quantizer._amax if module.input_quantizer.is_enabled else None
    if not context.is_writer:
        return
    for name, weight, weight_amax in zip(bound.rule.hf_names, weights, amaxes, strict=True):
        fmt = format_named(format_name)
        tensors = fmt.pack(
            weight,
            weight_amax,
            input_amax=input_amax,
            pre_quant_scale=factor,
            block_size=block_size,
        )
        _check_codes(name, fmt, tensors, weight)
        for suffix, tensor in tensors.items():
            yield f"{name.removesuffix('weight')}{suffix}", tensor


def _check_codes(name: str, fmt: Format, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
    decoded = fmt.unpack(tensors, dtype=weight.dtype, shape=weight.shape)
    # A code times its scale is rounded once more than ModelOpt's value.
    tolerance = 2 * torch.finfo(weight.dtype).eps
    if not torch.allclose(decoded, weight.float(), rtol=tolerance, atol=1e-30):
        raise VerificationError(
            "packing the weight changed it",
            where=name,
            found=f"a difference of {float((decoded - weight.float()).abs().max()):.3g}",
            allowed=f"relative {tolerance:.1g}",
            hint="please report this as a bug",
        )


def _whole(amax: Tensor, layout: Layout, context: ParallelContext, count: int) -> Sequence[Tensor]:
    """Scales ``[rows, blocks]`` of the whole layer, for each Hugging Face tensor in it."""
    shards = gather_shards(amax, context)
    if layout.dim is not None and amax.shape[layout.dim] > 1:
        return layout.split(shards)
    # One scale for all processes: calibration has made it the same on each.
    return [shards[0]] * count


def _is_linear(bound: BoundParameter) -> bool:
    return bound.tensor.dim() == 2 and not bound.name.startswith("embedding.")


def _module(model: nn.Module, bound: BoundParameter) -> Any:
    return model.get_submodule(bound.name.rpartition(".")[0])
