"""A distillation whose teacher lies in a cache, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.parallel import ParallelContext
from slimtron_distill.cache.store import TeacherCache
from slimtron_distill.config import DistillationConfig
from slimtron_distill.losses import kd_loss_from_top_k
from slimtron_distill.mixing import LM, LOGITS, TOTAL, LossMixer
from slimtron_distill.model.language import language_model_loss
from slimtron_distill.training.task import Losses

__all__ = ["CachedTask"]


class CachedTask:
    """The student alone; a ``Task``.

    Args:
        student: Its virtual pipeline chunks, or the one model.
        cache: The teacher's logits on the text that is trained on, finished.
        config: What the student learns: nothing of hidden states, which no cache holds.
        context: This process's place.
        vocab_size: Entries of the student's vocabulary without padding.
    """

    adjust_tensor_shapes_fn: Callable[..., Any] | None = None

    def __init__(
        self,
        student: Sequence[nn.Module],
        cache: TeacherCache,
        config: DistillationConfig,
        context: ParallelContext,
        *,
        vocab_size: int,
    ) -> None:
        self.chunks: Sequence[nn.Module] = [chunk.requires_grad_(True) for chunk in student]
        self.student_chunks: Sequence[nn.Module] = self.chunks
        self._cache, self._config, self._context = cache, config, context
        self._vocab_size = vocab_size
        self._mixer = LossMixer(config)
        self._names = [LOGITS] if config.skip_lm_loss else [LOGITS, LM]

    def forward_step(
        self, iterator: Iterator[Any], model: nn.Module
    ) -> tuple[Any, Callable[[Any], Losses]]:
        """Runs the next ``Batch`` through a chunk."""
        batch = next(iterator)
        tokens = batch["tokens"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output = model(tokens, positions, None)

        def loss_function(logits: Tensor) -> Losses:
            return self._losses(logits, batch)

        return output, loss_function

    def collect(self, losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Adds up the micro-batches' losses over the pipeline's stages."""
        sums = torch.zeros(len(self._names), 2, dtype=torch.float64, device=self._context.device)
        for part in losses:
            sums += torch.stack([part[name] for name in self._names])
        dist.all_reduce(sums, group=self._context.pp_group)
        means = dict(zip(self._names, sums[:, 0], strict=True))
        # The same sum of products, of tensors.
        mean: Any = self._mixer.weights.total(means)
        total = torch.stack([mean, sums[0, 1]])
        return {**dict(zip(self._names, sums, strict=True)), TOTAL: total}

    def observe(self, losses: Mapping[str, float]) -> None:
        """Takes the means of the step that is done."""
        self._mixer.observe(losses)

    def state_dict(self) -> dict[str, Any]:
        """What goes on from step to step beside the weights."""
        return self._mixer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self._mixer.load_state_dict(state)

    def extra_parameters(self) -> Mapping[str, nn.Parameter]:
        """Nothing beside the student is trained."""
        return {}

    def _losses(self, logits: Tensor, batch: Any) -> Losses:
        mask, weights = batch["loss_mask"], self._mixer.weights
        count = (mask != 0).sum()
        indices, largest = (part.to(logits.device) for part in self._cache.read(batch["rows"]))
        parts = {}
        total = logits.new_zeros((), dtype=torch.float32)
        if not self._config.skip_lm_loss:
            parts[LM] = language_model_loss(
                logits,
                batch["labels"],
                mask,
                group=self._context.tp_group,
                vocab_size=self._vocab_size,
            )
            total = total + weights.lm * parts[LM]
        parts[LOGITS] = kd_loss_from_top_k(
            logits,
            indices,
            largest,
            self._config.criterion,
            weights=mask,
            group=self._context.tp_group,
            vocab_size=self._cache.identity["vocab_size"],
        )
        total = total + weights.logits * parts[LOGITS]
        told = {n: torch.stack([v.detach().float(), count.float()]) for n, v in parts.items()}
        return total, count.int(), told
