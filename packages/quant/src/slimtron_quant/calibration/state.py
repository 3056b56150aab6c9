"""The outcome of a calibration on disk, so that it never has to be repeated.

Each process keeps its own part: the scales of its quantizers, and the weights of the layers
whose weights the algorithm changed (SmoothQuant and AWQ move a factor into them). Of processes
that hold the same, the first does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from slimtron_common.errors import CheckpointError
from slimtron_common.parallel.context import ParallelContext

__all__ = ["restore_calibration", "save_calibration"]

_SCALES = ("_amax", "_pre_quant_scale")


def save_calibration(directory: Path, model: nn.Module, context: ParallelContext) -> None:
    """Writes this process's part into an existing directory."""
    if context.expert_dp_rank == 0:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in _state(model).items()},
            _file(directory, context),
        )


@torch.no_grad()
def restore_calibration(directory: Path, model: nn.Module, context: ParallelContext) -> None:
    """Puts a saved calibration into a model that carries the same, uncalibrated quantizers.

    Args:
        directory: What ``save_calibration`` filled, in the same layout.
        model: The original weights under ModelOpt's quantizers.
        context: This process's place.

    Raises:
        CheckpointError: The file is missing or corrupt, or belongs to another model.
    """
    path = _file(directory, context)
    try:
        state = load_file(path, device=str(context.device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the calibration cannot be read: {error}", where=path) from error
    modules = dict(model.named_modules())
    for name, tensor in state.items():
        module_name, _, attribute = name.rpartition(".")
        module: Any = modules.get(module_name)
        if module is None:
            raise CheckpointError(
                "the calibration belongs to another model", where=path, found=module_name
            )
        if attribute == "weight":
            module.weight.copy_(tensor)
        elif attribute == "_pre_quant_scale":
            module._enable_pre_quant_scale = True
            module.pre_quant_scale = tensor
        else:
            module.amax = tensor


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for name, module in model.named_modules():
        for attribute in _SCALES:
            # An attribute that is no buffer is a scratch value of the algorithm.
            if attribute in module._buffers and hasattr(module, "num_bits"):
                state[f"{name}.{attribute}"] = module._buffers[attribute]
        quantizer = getattr(module, "input_quantizer", None)
        if quantizer is not None and "_pre_quant_scale" in quantizer._buffers:
            state[f"{name}.weight"] = module.weight
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def _file(directory: Path, context: ParallelContext) -> Path:
    place = f"pp{context.pp_rank}-tp{context.tp_rank}-ep{context.ep_rank}"
    return directory / f"calibration-{place}.safetensors"
