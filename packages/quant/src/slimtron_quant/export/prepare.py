"""Make the model in memory the one that will lie on disk, before it is measured."""

from __future__ import annotations

import torch
from torch import nn

from slimtron_common.models import Architecture
from slimtron_quant.export.folding import fold_input_factors
from slimtron_quant.export.settle import settle_scales
from slimtron_quant.formats.detect import detect_format

__all__ = ["prepare_for_export"]


@torch.no_grad()
def prepare_for_export(
    model: nn.Module, architecture: Architecture, *, dtype: torch.dtype, packs: bool
) -> None:
    """Rounds to the type that is written, in place, and for engines folds factors on inputs.

    Doing it twice changes nothing.

    Args:
        model: The bare Megatron-Core model with calibrated quantizers.
        architecture: What it is.
        dtype: Type on disk of what is not packed.
        packs: Whether quantized weights lie on disk as codes and scales. In a Megatron checkpoint
            they lie beside their quantizers, to be trained on: nothing is folded into them.
    """
    if packs:
        fold_input_factors(model, architecture, dtype=dtype)
        settle_scales(model)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_packed = packs and name.endswith(".weight") and detect_format(module) is not None
        if not is_packed:
            parameter.copy_(parameter.to(dtype))
