"""How far a model is from the truth and from a reference model, token by token.

The functions work on one shard of the vocabulary and agree on every rank of the tensor-parallel
group. Logits may be of any floating dtype; they are taken to fp32 in pieces, so that beside the
logits only a few temporaries of bounded size exist. No gradient is kept.

Legend: ``b`` micro-batch, ``s`` sequence, ``v`` padded vocabulary, ``tp`` tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "MetricAccumulator",
    "vocab_parallel_argmax",
    "vocab_parallel_kl",
    "vocab_parallel_token_nll",
]

_TEMPORARY_ELEMENTS = 2**25
"""Upper bound of one fp32 temporary: 128 MiB, about 256 tokens of a 128k vocabulary."""


@torch.no_grad()
def vocab_parallel_token_nll(
    logits: Tensor, targets: Tensor, vocab_start: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Negative log-likelihood of the target tokens.

    Args:
        logits: ``[b, s, v/tp]``, the local vocabulary shard. ``-inf`` marks padded entries.
        targets: ``[b, s]`` integer, indices into the whole vocabulary.
        vocab_start: Index of the shard's first entry in the whole vocabulary.
        group: The tensor-parallel group; None when the vocabulary is whole.

    Returns:
        ``[b, s]`` fp32, in nats. ``inf`` where the target's logit is ``-inf``; NaN where no
        shard holds the target (a padding label such as -100) or no logit is finite.
    """
    peak = _global_peak(logits, group=group)
    local_targets = targets.long() - vocab_start
    is_local = (local_targets >= 0) & (local_targets < logits.shape[-1])
    local_targets = torch.where(is_local, local_targets, 0)

    sums = logits.new_empty((3, *targets.shape), dtype=torch.float64)
    normalizer, target_logit, owners = sums.unbind()
    owners.copy_(is_local)
    for where in _pieces(logits):
        shifted = logits[where].float() - peak[where].unsqueeze(-1)
        target = shifted.gather(-1, local_targets[where].unsqueeze(-1)).squeeze(-1)
        target_logit[where] = torch.where(is_local[where], target, 0.0)
        normalizer[where] = shifted.exp_().sum(-1)
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    nll = normalizer.log() - target_logit
    return torch.where(owners == 1, nll, torch.nan).float()


@torch.no_grad()
def vocab_parallel_kl(
    reference_logits: Tensor, logits: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """KL divergence of the model's next-token distribution from the reference's.

    ``KL(reference || model) = sum_v p_ref(v) (log p_ref(v) - log p_model(v))``. Entries to which
    the reference gives no probability contribute 0, whatever the model says.

    Args:
        reference_logits: ``[b, s, v/tp]``, the local vocabulary shard of the reference model.
        logits: ``[b, s, v/tp]``, the same shard of the model under test.
        group: The tensor-parallel group; None when the vocabulary is whole.

    Returns:
        ``[b, s]`` fp32, in nats, never negative. ``inf`` where the model excludes (``-inf``) an
        entry that the reference holds possible.
    """
    reference_peak, peak = _global_peak(reference_logits, logits, group=group)
    sums = logits.new_empty((3, *logits.shape[:-1]), dtype=torch.float64)
    reference_normalizer, normalizer, weighted_gap = sums.unbind()
    for where in _pieces(logits):
        reference = reference_logits[where].float() - reference_peak[where].unsqueeze(-1)
        model = logits[where].float() - peak[where].unsqueeze(-1)
        gap = reference - model
        weight = reference.exp_()
        # 0 * inf and inf - inf are NaN; an impossible entry has no say.
        weighted_gap[where] = gap.mul_(weight).masked_fill_(weight == 0, 0.0).sum(-1)
        reference_normalizer[where] = weight.sum(-1)
        normalizer[where] = model.exp_().sum(-1)
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    log_ratio = normalizer.log() - reference_normalizer.log()
    # Rounding can leave about -1e-7 where the two distributions are all but equal.
    return (weighted_gap / reference_normalizer + log_ratio).clamp_(min=0.0).float()


@torch.no_grad()
def vocab_parallel_argmax(
    logits: Tensor, vocab_start: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Index of the likeliest token; of equal ones the lowest.

    Args:
        logits: ``[b, s, v/tp]``, the local vocabulary shard.
        vocab_start: Index of the shard's first entry in the whole vocabulary.
        group: The tensor-parallel group; None when the vocabulary is whole.

    Returns:
        ``[b, s]`` int64, indices into the whole vocabulary. NaN counts as the largest value, as
        in `torch.argmax`.
    """
    local_peak, index = logits.max(dim=-1)
    local_peak = local_peak.float().nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    peak = local_peak.clone()
    _all_reduce(peak, dist.ReduceOp.MAX, group)
    candidate = torch.where(local_peak == peak, index + vocab_start, torch.iinfo(torch.int64).max)
    _all_reduce(candidate, dist.ReduceOp.MIN, group)
    return candidate


class MetricAccumulator:
    """Sums token metrics over batches and ranks, in float64.

    Args:
        device: Where the sums live: that of the logits, so that `reduce` can use their group.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # One row each for nll, kl, agreement: the sum over tokens, and how many they were.
        self._sums = torch.zeros(3, 2, dtype=torch.float64, device=device)

    def update(
        self,
        nll: Tensor,
        kl: Tensor | None = None,
        agreement: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Adds one batch.

        Args:
            nll: ``[b, s]``, negative log-likelihood in nats.
            kl: ``[b, s]``, KL(reference || model) in nats; None without a reference.
            agreement: ``[b, s]`` bool, whether both models' likeliest tokens are the same.
            mask: ``[b, s]`` bool or float; tokens where it is 0 are left out, even if NaN.
        """
        kept = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask != 0
        for row, values in zip(self._sums, (nll, kl, agreement), strict=True):
            if values is not None:
                row[0] += torch.where(kept, values.double(), 0.0).sum()
                row[1] += kept.sum()

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Adds up the sums of every rank of a group that split the tokens (DP, CP), in place."""
        _all_reduce(self._sums, dist.ReduceOp.SUM, group)

    def result(self) -> dict[str, float | int | None]:
        """Means over all tokens seen.

        Returns:
            ``perplexity``; ``loss``, the mean nll in nats; ``kl``, the mean KL(reference || model)
            in nats; ``agreement``, a fraction; ``num_tokens``. A mean over no tokens is None.
        """
        sums, counts = self._sums.unbind(dim=1)
        has_tokens = counts.bool().tolist()
        loss, kl, agreement = (
            value if known else None
            for value, known in zip((sums / counts).tolist(), has_tokens, strict=True)
        )
        perplexity = (sums[0] / counts[0]).exp().item() if has_tokens[0] else None
        return {
            "perplexity": perplexity,
            "loss": loss,
            "kl": kl,
            "agreement": agreement,
            "num_tokens": int(counts[0]),
        }


def _global_peak(*logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Largest logit over the whole vocabulary: ``[b, s]`` fp32, or stacked ``[n, b, s]``.

    Shifting by it before exponentiating keeps huge logits from overflowing and small
    differences between huge logits from being lost.
    """
    peaks = torch.stack([shard.amax(-1).float() for shard in logits])
    _all_reduce(peaks, dist.ReduceOp.MAX, group)
    return peaks if len(logits) > 1 else peaks[0]


def _pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Indices ``(row, tokens)`` of pieces of ``[b, s, v/tp]`` small enough to hold in fp32."""
    batch, length, width = logits.shape
    step = max(1, _TEMPORARY_ELEMENTS // width)
    for row in range(batch):
        for start in range(0, length, step):
            yield row, slice(start, start + step)


def _all_reduce(
    tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
