"""Move the factors on the inputs of layers into what makes these inputs, where that is exact.

SmoothQuant and AWQ multiply a layer's input by a factor. A norm multiplies by its weight last,
the values are averaged by attention and then read by the output projection, and the up projection
is multiplied by the activated gate: each can take the factor of the layer behind it.

Inference engines fuse the projections behind a norm and have no place for a factor before them, so
these always move. The others stay where they would change what is computed, and are stored beside
the layer: where query heads that read the same values have different factors, where the
producer's quantizer has one scale for several output channels, and where its weight, in the type
that it has, would be rounded to another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.checkpoint.weights import BoundParameter, bound_parameters
from slimtron_common.models import Architecture
from slimtron_quant.formats import format_named
from slimtron_quant.formats.detect import detect_format

__all__ = ["fold_input_factors", "input_factor"]


@torch.no_grad()
def fold_input_factors(model: nn.Module, architecture: Architecture, *, dtype: torch.dtype) -> None:
    """Folds in place; does nothing where nothing is left to fold.

    A norm's new weight is rounded to the type that it will be written in, and so are the
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
            if factor is not None:
                if norm:
                    _fold_into_norm(norm, factor, architecture, dtype)
                    _remove_factor(module)
                elif _fold_into_producer(model, bound, factor, architecture, dtype):
                    _remove_factor(module)
                else:
                    factor.copy_(factor.to(dtype))
            # Anything else reads something else: experts share a norm with their router.
            norm = []


def input_factor(module: Any) -> Tensor | None:
    """The factor ``[in]`` that a linear layer multiplies its input by, if any."""
    quantizer = getattr(module, "input_quantizer", None)
    factor: Tensor | None = getattr(quantizer, "pre_quant_scale", None)
    return None if factor is None else factor.reshape(-1)


def _remove_factor(module: Any) -> None:
    del module.input_quantizer._pre_quant_scale
    module.input_quantizer._enable_pre_quant_scale = False


def _fold_into_norm(
    norm: list[BoundParameter], factor: Tensor, architecture: Architecture, dtype: torch.dtype
) -> None:
    # Some families keep what is added to 1.
    offset = float(architecture.normalization.endswith("1p"))
    for part, start in zip(norm, (offset, 0.0), strict=False):
        scaled = (part.tensor.float() + start) * factor.float() - start
        part.tensor.copy_(scaled.to(dtype))


def _fold_into_producer(
    model: nn.Module,
    bound: BoundParameter,
    factor: Tensor,
    architecture: Architecture,
    dtype: torch.dtype,
) -> bool:
    """Scales the output channels that become this layer's input; False where that is not exact."""
    block_name, _, layer = bound.name.removesuffix(".weight").rpartition(".")
    block: Any = model.get_submodule(block_name)
    producer, rows = None, None
    if layer == "linear_proj":
        producer, rows = block.linear_qkv, _value_rows(block, factor, architecture)
    elif layer == "linear_fc2":
        producer, rows = block.linear_fc1, _up_rows(factor, architecture)
    if producer is None or rows is None or not _takes_rows(producer, dtype):
        return False
    weight, bias = producer.weight, getattr(producer, "bias", None)
    if detect_format(producer) is not None:
        # The rounded weight keeps its codes, whatever the product with the factor rounds to.
        weight.copy_(producer.weight_quantizer(weight))
        amax = producer.weight_quantizer._amax
        amax.copy_((amax.view(len(rows), -1) * rows[:, None]).view_as(amax))
    weight.mul_(rows[:, None])
    # Transformer Engine's layers without a bias have an empty one.
    if bias is not None and bias.numel():
        bias.mul_(rows)
    return True


def _value_rows(attention: Any, factor: Tensor, architecture: Architecture) -> Tensor | None:
    """Factors ``[out]`` on the output channels of QKV; None where heads share values unequally."""
    quantized_values = getattr(attention.core_attention, "v_bmm_quantizer", None)
    if quantized_values is not None and quantized_values.is_enabled:
        return None
    queries = architecture.num_attention_heads // architecture.num_query_groups
    by_group = factor.float().view(-1, queries, architecture.head_dim)
    if not bool((by_group == by_group[:, :1]).all()):
        return None
    rows = torch.ones_like(by_group[:, :1]).repeat(1, queries + 2, 1)
    rows[:, -1] = by_group[:, 0]
    return rows.flatten()


def _up_rows(factor: Tensor, architecture: Architecture) -> Tensor:
    """Factors ``[out]`` on the output channels of the (gate and) up projection."""
    factor = factor.float()
    if architecture.gated:
        return torch.cat([torch.ones_like(factor), factor])
    # max(c x, 0)^2 is c^2 max(x, 0)^2 for a positive c.
    assert architecture.activation == "squared_relu", "no other activation without a gate"
    return factor.sqrt()


def _takes_rows(producer: Any, dtype: torch.dtype) -> bool:
    """Whether output channels can be scaled one by one without another rounding."""
    outputs = getattr(producer, "output_quantizer", None)
    if outputs is not None and outputs.is_enabled:
        return False
    found = detect_format(producer)
    if found is None:
        return bool(dtype == producer.weight.dtype == torch.float32)
    fmt = format_named(found.name)
    if fmt.has_two_levels or fmt.block_shape(1)[0] != 1:
        return False
    bits = producer.weight_quantizer.num_bits
    # A product must not be rounded as far as half a code.
    return isinstance(bits, int) and 2**bits * torch.finfo(producer.weight.dtype).eps < 0.5
