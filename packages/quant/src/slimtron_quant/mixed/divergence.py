r"""What each format does to the model's predictions, one group of layers at a time.

A group's sensitivity to a format is the mean Kullback-Leibler divergence, in nats a token, of the
original's next-token distribution from that of the same model with this group alone in the
format. To second order in the rounding errors the divergences of groups add up, because those
errors are as good as independent: that is the objective of HAWQ-V3
(https://arxiv.org/abs/2011.10680) and of ModelOpt's ``auto_quantize``.

It is measured, not estimated from gradients as ``auto_quantize`` does by default. On SmolLM2 an
estimate by the diagonal of the empirical Fisher information was 1.3 (INT4) and 1.7 (FP8) times the
measured loss in the sum, and put 0.1 nats where there was no loss, on a projection with outlying
activations: a budget would have been spent on it. A measurement needs no backward pass and no
stored activations, holds for large errors (INT4) too, covers what the format does to the inputs,
and runs wherever the model does, at any layout and in bfloat16. ``auto_quantize`` offers it as
``method="kl_div"``, for models that one process holds whole. A divergence needs few tokens: unlike
a loss, it does not fluctuate with the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.evaluation.metrics import vocab_parallel_kl
from slimtron_common.parallel import ParallelContext, forward_only
from slimtron_common.progress import Progress
from slimtron_quant.formats.detect import quantizer_stages
from slimtron_quant.mixed.groups import FormatGroup
from slimtron_quant.mixed.replay import Replay
from slimtron_quant.summary import global_name, linear_modules

__all__ = ["Divergence", "measure_groups"]


class Divergence:
    """Distance of a model that changes from what it was at first.

    Args:
        model: The bare Megatron-Core model, as it is to be compared with.
        batches: This data-parallel rank's token ids, each ``[b, s]``.
        context: This process's place.
        vocab_size: True vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        context: ParallelContext,
        *,
        vocab_size: int,
    ) -> None:
        self._batches, self._context, self._vocab_size = batches, context, vocab_size
        self._references: dict[int, Tensor] = {}
        forward_only(model, batches, context, self._keep)

    def run(self, model: nn.Module) -> None:
        """Runs the text and measures nothing."""
        forward_only(model, self._batches, self._context)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Returns the divergence, nats per token; the same on every process."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._context.device)

        def add(index: int, logits: Tensor) -> None:
            divergences = vocab_parallel_kl(
                self._references[index], self._masked(logits), self._context.tp_group
            )
            sums[0] += divergences.sum(dtype=torch.float64)
            sums[1] += divergences.numel()

        forward_only(model, self._batches, self._context, add)
        # Only the last stage has counted anything.
        for group in (self._context.dp_cp_group, self._context.pp_group):
            dist.all_reduce(sums, group=group)
        return float(sums[0] / sums[1])

    def _keep(self, index: int, logits: Tensor) -> None:
        self._references[index] = self._masked(logits).clone()

    def _masked(self, logits: Tensor) -> Tensor:
        start = self._context.tp_rank * logits.shape[-1]
        logits[..., max(0, self._vocab_size - start) :] = float("-inf")
        return logits


def measure_groups(
    model: nn.Module, groups: Sequence[FormatGroup], divergence: Divergence, *, description: str
) -> dict[str, float]:
    """Measures what the quantizers of each group do alone.

    Args:
        model: The bare Megatron-Core model with calibrated quantizers. A factor between inputs and
            weights (AWQ, SmoothQuant) stays where quantizers are off, and cancels.
        groups: All groups of the whole model, the same on every process.
        divergence: From the original.
        description: What the progress display says.

    Returns:
        Nats per token by the group's name; the same on every process.
    """
    quantizers = {
        global_name(model, name): list(_enabled(module))
        for name, module in linear_modules(model).items()
    }
    replay = Replay(model, lambda: divergence.run(model))
    found = {}
    with Progress(description, len(groups)) as progress, _disabled(quantizers.values()):
        for group in sorted(groups, key=lambda group: group.layer):
            replay.move_to(group.layer)
            chosen = [q for member in group.members for q in quantizers.get(member, ())]
            for quantizer in chosen:
                quantizer.enable()
            with replay.active():
                found[group.name] = divergence.measure(model)
            for quantizer in chosen:
                quantizer.disable()
            progress.advance()
    return found


def _enabled(module: Any) -> Iterator[Any]:
    for name in ("weight_quantizer", "input_quantizer"):
        if (quantizer := getattr(module, name, None)) is not None:
            yield from (stage for stage in quantizer_stages(quantizer) if stage.is_enabled)


@contextmanager
def _disabled(groups: Any) -> Iterator[None]:
    quantizers = [quantizer for group in groups for quantizer in group]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()
