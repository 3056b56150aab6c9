"""Move the factors on the inputs of the layers right behind a norm into that norm.

SmoothQuant and AWQ multiply a layer's input by a factor. Inference engines fuse these
projections and have no place for one between norm and product, but a norm multiplies by its
weight last, so that its weight (and its bias) can take the factor.
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

    The norm's new weight is rounded to the type that it will be written in, and so are the
    factors that stay, so that the model in memory is the one on disk.

    Args:
        model: The bare Megatron-Core model with calibrated quantizers.
        architecture: What it is.
        dtype: Type of norms and factors on disk.
    """
    norm: list[BoundParameter] = []
    for bound in bound_parameters(model, architecture):
        kind = bound.rule.hf_names[0].rpartition("layernorm.")[2]
        if kind == "weight":
            norm = [bound]
        elif kind == "bias":
            norm.append(bound)
        elif bound.tensor.dim() == 2:
            module: Any = model.get_submodule(bound.name.rpartition(".")[0])
            factor = input_factor(module)
            if factor is not None and norm:
                # Some families keep what is added to 1.
                offset = float(architecture.normalization.endswith("1p"))
                for part, start in zip(norm, (offset, 0.0), strict=False):
                    scaled = (part.tensor.float() + start) * factor.float() - start
                    part.tensor.copy_(scaled.to(dtype))
                del module.input_quantizer._pre_quant_scale
                module.input_quantizer._enable_pre_quant_scale = False
            elif factor is not None:
                factor.copy_(factor.to(dtype))
            # Anything else reads something else: experts share a norm with their router.
            norm = []


def input_factor(module: Any) -> Tensor | None:
    """The factor ``[in]`` that a linear layer multiplies its input by, if any."""
    quantizer = getattr(module, "input_quantizer", None)
    factor: Tensor | None = getattr(quantizer, "pre_quant_scale", None)
    return None if factor is None else factor.reshape(-1)
