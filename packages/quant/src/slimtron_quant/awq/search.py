r"""The mathematics of the scale search.

A linear layer ``y = x W^T`` with a scale :math:`s` on its input channels computes with
:math:`\hat W = Q(W \operatorname{diag}(s)) \operatorname{diag}(1/s)`. Over calibration inputs
:math:`X` its squared output error is a quadratic form of the weight error alone,

.. math:: \|X (\hat W - W)^T\|^2 = \operatorname{tr}((\hat W - W)\, X^T X\, (\hat W - W)^T),

so the inputs are needed once, to sum :math:`X^T X`, whatever the number of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from slimtron_quant.awq.shard import Shard, all_reduce

__all__ = ["InputStatistics", "candidate_scales", "output_energy", "weight_magnitude"]

_TINY = torch.finfo(torch.float32).tiny


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
        self.rows = shard.part(in_features)
        self.moment = torch.zeros(
            self.rows.stop - self.rows.start, in_features, dtype=torch.float32, device=device
        )
        """Rows ``self.rows`` of ``X^T X``: ``[in/tp, in]`` fp32."""
        self.magnitude = torch.zeros(in_features, dtype=torch.float64, device=device)
        """Sum of ``|x|``: ``[in]`` fp64."""
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        """Adds inputs.

        Args:
            x: ``[n, in]``, any float dtype: tokens with all input channels.
        """
        self.magnitude += x.abs().sum(0, dtype=torch.float64)
        self.num_tokens += x.shape[0]
        rows = x[:, self.rows].T
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            # The tensor cores multiply exactly and add in fp32, many times as fast as fp32 GEMMs.
            self.moment += torch.mm(rows, x, out_dtype=torch.float32)
        else:
            self.moment.addmm_(rows.float(), x.float())

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Sums over the processes that saw other tokens."""
        for total in (self.moment, self.magnitude, self.num_tokens):
            all_reduce(total, group)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean of ``|x|`` over all tokens, ``[in]`` fp32; 0 without tokens.

        Every token weighs the same, however the text was cut into batches; ModelOpt averages
        the means of the batches.
        """
        return (self.magnitude / self.num_tokens.clamp(min=1)).float()


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


def output_energy(weight: Tensor, statistics: InputStatistics, shard: Shard) -> Tensor:
    """Computes this process's part of ``||X W^T||^2``, summed over tokens and output channels.

    Args:
        weight: A weight or a weight's error, cut as ``shard`` says, fp32.
        statistics: Of the inputs ``X``.
        shard: How the weight is cut.

    Returns:
        fp64 scalar; its sum over the group of ``shard`` is the whole.
    """
    # W M W^T over the rows of M that this process holds needs all of W: nothing is approximated
    # where the input channels, and with them the products between them, lie on several processes.
    whole = shard.gather(weight, shard.dim)
    return (whole @ statistics.moment.T).mul_(whole[:, statistics.rows]).sum(dtype=torch.float64)
