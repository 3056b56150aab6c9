"""Norms of torch under Megatron-Core's constructor, fit for sequence parallelism.

Megatron-Core's own wrapper of torch's norms refuses it, and weights that are stored less 1. Each
parameter is marked ``sequence_parallel``, as Transformer Engine's norms do, so that Megatron sums
its gradient over the tensor-parallel processes.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from slimtron_common.models.architecture import Normalization

__all__ = ["NORMS", "LayerNorm1P", "RMSNorm", "RMSNorm1P"]


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class RMSNorm1P(RMSNorm):
    """Root-mean-square norm whose weight is stored less 1, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``."""
        weight = self.weight.float() + 1
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class LayerNorm1P(nn.LayerNorm):
    """Layer norm with a bias whose weight is stored less 1, computed in float32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``."""
        weight, bias = self.weight.float() + 1, self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


NORMS: dict[Normalization, type[nn.Module]] = {
    "rmsnorm": RMSNorm,
    "rmsnorm1p": RMSNorm1P,
    "layernorm1p": LayerNorm1P,
}


def _mark(norm: nn.Module, config: Any) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
