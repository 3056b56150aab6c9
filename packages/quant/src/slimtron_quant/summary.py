"""What a quantization did: which layer got which format, and how far its weights moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from slimtron_common.parallel.context import ParallelContext
from slimtron_quant.formats.detect import detect_format

__all__ = [
    "LayerSummary",
    "expert_range",
    "global_name",
    "layer_offset",
    "linear_modules",
    "summarize",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One linear layer after quantization."""

    name: str
    """Module name, layers and experts counted from 0 over the whole model."""

    format: str | None
    """Format of the weights; None where they stay as they were."""

    num_parameters: int
    """Weights of the whole layer, over all tensor-parallel processes."""

    input_amax: float | None
    """Largest calibrated input, None where inputs are not quantized."""

    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of the weights, in decibels:
    ``10 log10(||W||^2 / ||W - Q(W)||^2)``; None where they are not quantized."""

    reason: str | None = None
    """Why the weights stay as they were; None where they are quantized."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """Returns the linear layers of the decoder by name, local to this pipeline stage."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("decoder.layers.") and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
    }  # fmt: skip


@torch.no_grad()
def summarize(
    model: nn.Module,
    context: ParallelContext,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> list[LayerSummary]:
    """Describes every linear layer of the whole model; the same list on every process.

    Args:
        model: The bare Megatron-Core model with calibrated quantizers.
        context: This process's place.
        reasons: Why layers stay as they are, by name in the whole model (``Scheme.reasons``).
    """
    rows = {}
    for name, module in linear_modules(model).items():
        sums = torch.zeros(3, dtype=torch.float64, device=context.device)
        sums[2] = module.weight.numel()
        spec = detect_format(module)
        if spec is not None:
            weight = module.weight.float()
            sums[0] = weight.square().sum()
            sums[1] = (weight - module.weight_quantizer(module.weight).float()).square().sum()
        dist.all_reduce(sums, group=context.tp_group)
        signal, noise, count = sums.tolist()
        inputs = getattr(module, "input_quantizer", None)
        amax = getattr(inputs, "_amax", None) if getattr(inputs, "is_enabled", False) else None
        sqnr = None
        if spec is not None:
            sqnr = 10 * float(torch.log10(torch.tensor(signal / max(noise, 1e-300))))
        whole_name = global_name(model, name)
        rows[whole_name] = LayerSummary(
            name=whole_name,
            format=None if spec is None else spec.name,
            num_parameters=int(count),
            input_amax=None if amax is None else float(amax.max()),
            sqnr_db=sqnr,
            reason=None if spec else reasons.get(whole_name, _other_reason(name)),
        )
    return list(context.joined(rows).values())


def _other_reason(name: str) -> str:
    return "router" if "router" in name else "not a layer that recipes quantize"


def layer_offset(model: Any) -> int:
    """Layers of the whole model that come before this pipeline stage's first."""
    return int(model.decoder.layers[0].layer_number) - 1


def expert_range(model: Any) -> range:
    """The experts of the whole model that this process holds; empty for a dense model."""
    indices = getattr(model.decoder.layers[0].mlp, "local_expert_indices", [])
    return range(indices[0], indices[-1] + 1) if indices else range(0)


def global_name(model: Any, name: str) -> str:
    """Numbers a module's layer, and its expert if it is in one, as in the whole model.

    Args:
        model: The bare Megatron-Core model.
        name: A name in this process, beginning with ``decoder.layers.``.
    """
    parts = name.split(".")
    parts[2] = str(int(parts[2]) + layer_offset(model))
    if "local_experts" in parts:
        number = parts.index("local_experts") + 1
        parts[number] = str(int(parts[number]) + expert_range(model).start)
    return ".".join(parts)
