"""Move the factors on the inputs of QKV, gate and up into the norm before them.

SmoothQuant and AWQ multiply a layer's input by a factor. Inference engines fuse these
projections and have no place for one between norm and product, but an RMSNorm multiplies by its
weight last, so that its weight can take the factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.checkpoint.weights import BoundParameter, bound_parameters
from slimtron_common.models import Architecture

__all__ = ["fold_input_factors", "input_factor"]


@torch.no_grad()
def fold_input_factors(model: nn.Module, architecture: Architecture, *, dtype: torch.dtype) -> None:
    """Folds in place; does nothing where nothing is left to fold.

    The norm's new weight is rounded to the type that it will be written in, so that the model
    in memory is the one on disk.

    Args:
        model: The bare Megatron-Core model with calibrated quantizers.
        architecture: What it is.
        dtype: Type of the norms on disk.
    """
    norm: BoundParameter | None = None
    for bound in bound_parameters(model, architecture):
        if bound.rule.hf_names[0].endswith("layernorm.weight"):
            norm = bound
        elif norm is not None and len(bound.rule.hf_names) > 1 and bound.tensor.dim() == 2:
            module: Any = model.get_submodule(bound.name.rpartition(".")[0])
            factor = input_factor(module)
            if factor is not None:
                folded = (norm.tensor.float() * factor.float()).to(dtype)
                norm.tensor.copy_(folded)
                del module.input_quantizer._pre_quant_scale
                module.input_quantizer._enable_pre_quant_scale = False


def input_factor(module: Any) -> Tensor | None:
    """The factor ``[in]`` that a linear layer multiplies its input by, if any."""
    quantizer = getattr(module, "input_quantizer", None)
    factor: Tensor | None = getattr(quantizer, "pre_quant_scale", None)
    return None if factor is None else factor.reshape(-1)
