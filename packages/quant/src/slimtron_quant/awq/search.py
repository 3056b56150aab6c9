r"""The mathematics of the scale search.

A linear layer ``y = x W^T`` with a scale :math:`s` on its input channels computes with
:math:`\hat W = Q(W \operatorname{diag}(s)) \operatorname{diag}(1/s)`. Over calibration inputs
:math:`X` its squared output error is a quadratic form of the weight error alone,

.. math:: \|X (\hat W - W)^T\|^2 = \operatorname{tr}((\hat W - W)\, X^T X\, (\hat W - W)^T),

so the inputs are needed once, to sum :math:`X^T X`, whatever the number of candidates. Of the sum
its diagonal is drawn out: with :math:`d_i = \|X_i\|` and the correlations
:math:`C = \operatorname{diag}(1/d)\, X^T X \operatorname{diag}(1/d)` the error is
:math:`\operatorname{tr}(E\, C\, E^T)`, :math:`E = (\hat W - W) \operatorname{diag}(d)`. No channel
dominates :math:`C`, its diagonal is 1, and the errors of different output channels are as good as
independent, so that rounding both factors to bfloat16 moves the sum by about 1e-5 of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from slimtron_quant.awq.shard import Shard, all_reduce

__all__ = ["Correlations", "InputStatistics", "candidate_scales", "weight_magnitude"]

_TINY = torch.finfo(torch.float32).tiny
_ROWS_AT_ONCE = 8192


class InputStatistics:
    """Sums over a linear layer's calibration inputs, all that the search needs of them.

    Takes ``4 * in * in / tp`` bytes: each tensor-parallel process keeps its part of the rows
    of ``X^T X``, as many for a column-parallel layer as for a row-parallel one.

    Args:
        in_features: Input channels of the whole layer.
        shard: How the layer's weight is cut.
        device: Where the sums are kept.
    """

    def __init__(self, in_features: int, shard: Shard, device: torch.device) -> None:
        self.shard = shard
        self.rows = shard.part(in_features)
        self.moment = torch.zeros(
            self.rows.stop - self.rows.start, in_features, dtype=torch.float32, device=device
        )
        """Rows ``self.rows`` of ``X^T X``: ``[in/tp, in]`` fp32."""
        self.magnitude = torch.zeros(in_features, dtype=torch.float64, device=device)
        """Sum of ``|x|``: ``[in]`` fp64."""
        self.num_tokens = 0

    def update(self, x: Tensor) -> None:
        """Adds inputs.

        Args:
            x: ``[n, in]``, any float dtype: tokens with all input channels.
        """
        self.magnitude += torch.linalg.vector_norm(x, 1, dim=0, dtype=torch.float32)
        self.num_tokens += x.shape[0]
        rows = x[:, self.rows].T
        if _on_tensor_cores(x):
            torch.addmm(self.moment, rows, x, out_dtype=torch.float32, out=self.moment)
        else:
            self.moment.addmm_(rows.float(), x.float())

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Sums over the processes that saw other tokens."""
        tokens = torch.tensor(self.num_tokens, device=self.moment.device)
        for total in (self.moment, self.magnitude, tokens):
            all_reduce(total, group)
        self.num_tokens = int(tokens)

    def correlations(self, dtype: torch.dtype) -> Correlations:
        """Draws the diagonal out of the sums, which are gone after it.

        Args:
            dtype: Type to hold the correlations in.
        """
        norms = self.shard.gather(self.moment.diagonal(self.rows.start).sqrt(), 0)
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        self.moment *= inverse[self.rows, None]
        self.moment *= inverse
        found = Correlations(norms, self.moment.to(dtype), self.rows, self.shard)
        del self.moment
        return found

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean of ``|x|`` over all tokens, ``[in]`` fp32; 0 without tokens.

        Every token weighs the same, however the text was cut into batches; ModelOpt averages
        the means of the batches.
        """
        return (self.magnitude / max(self.num_tokens, 1)).float()


@dataclass(frozen=True, slots=True)
class Correlations:
    """How a layer's input channels vary together."""

    norms: Tensor
    """``d``: root of the sum of squares of each channel, ``[in]`` fp32."""

    matrix: Tensor
    """Rows ``rows`` of ``C``: ``[in/tp, in]``."""

    rows: slice
    shard: Shard

    @property
    def local_norms(self) -> Tensor:
        """``d`` of the input channels that this process's weight has."""
        return self.norms[self.rows] if self.shard.dim == 1 else self.norms

    def energy(self, scaled: Tensor) -> Tensor:
        """Computes this process's part of ``tr(E C E^T)``.

        Args:
            scaled: ``E``, a weight or a weight's error times ``local_norms``, cut as the weight
                is, fp32.

        Returns:
            fp64 scalar; its sum over the group of ``shard`` is the whole.
        """
        # E C E^T over the rows of C that this process holds needs all of E: nothing is
        # approximated where the input channels lie on several processes.
        whole = self.shard.gather(scaled.to(self.matrix.dtype), self.shard.dim)
        total = torch.zeros((), dtype=torch.float64, device=whole.device)
        for part in torch.split(whole, _ROWS_AT_ONCE):
            if _on_tensor_cores(part):
                product = torch.mm(part, self.matrix.T, out_dtype=torch.float32)
            else:
                product = part.float() @ self.matrix.T.float()
            total += product.mul_(part[:, self.rows]).sum(dtype=torch.float64)
        return total


def _on_tensor_cores(x: Tensor) -> bool:
    # They multiply half types exactly and add in fp32, many times as fast as fp32 GEMMs.
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def weight_magnitude(weight: Tensor, block_size: int | None, shard: Shard) -> Tensor:
    """Computes how large each input channel's weights are among those they share a scale with.

    Args:
        weight: ``[out/tp, in]`` or ``[out, in/tp]``, any float dtype.
        block_size: Input channels that share a quantization scale; None for all of them.
        shard: How the weight is cut; no block reaches over the edge of a shard.

    Returns:
        Mean over output channels of ``|w| / max |w of its block|``: ``[in]`` fp32, all input
        channels of the layer.
    """
    out_features, in_features = weight.shape
    magnitude = weight.abs().float()
    if block_size is None:
        largest = magnitude.amax(1, keepdim=True)
        if shard.dim == 1:
            all_reduce(largest, shard.group, dist.ReduceOp.MAX)
        relative = magnitude / (largest + _TINY)
    else:
        padded = F.pad(magnitude, (0, -in_features % block_size))
        blocks = padded.view(out_features, -1, block_size)
        relative = (blocks / (blocks.amax(2, keepdim=True) + _TINY)).flatten(1)[:, :in_features]
    total = relative.sum(0, dtype=torch.float64)
    if shard.dim == 1:
        return (shard.gather(total, 0) / out_features).float()
    return (all_reduce(total, shard.group) / (out_features * shard.size)).float()


def candidate_scales(
    input_magnitude: Tensor, weight_magnitude: Tensor, alphas: Sequence[float | None]
) -> list[Tensor]:
    r"""Computes the candidates for the scale of the input channels.

    .. math:: s(\alpha) = \frac{x^\alpha}{w^{1 - \alpha}}, \quad s \leftarrow
              \frac{s}{\sqrt{\max s \, \min s}}

    with ``s`` clamped to ``[1e-4, 1e4]`` before the normalisation, as ModelOpt does.

    Args:
        input_magnitude: ``x``, ``[in]`` fp32, of all input channels.
        weight_magnitude: ``w``, ``[in]`` fp32.
        alphas: Exponents from 0 to 1; None stands for the scale 1.

    Returns:
        A scale ``[in]`` fp32 for each of ``alphas``.
    """
    scales = []
    for alpha in alphas:
        if alpha is None:
            scales.append(torch.ones_like(input_magnitude))
            continue
        scale = input_magnitude.pow(alpha) / (weight_magnitude.pow(1 - alpha) + _TINY)
        scale = scale.clamp(1e-4, 1e4)
        scales.append(scale / (scale.max() * scale.min()).sqrt())
    return scales
