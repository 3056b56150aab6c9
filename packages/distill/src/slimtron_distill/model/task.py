"""A distillation as the training loop sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.errors import ConfigError
from slimtron_common.parallel import ParallelContext
from slimtron_common.parallel.context_parallel import cut_over_context
from slimtron_distill.config import DistillationConfig
from slimtron_distill.hidden import gradient_scale, match_pairs
from slimtron_distill.losses.kd import kd_loss
from slimtron_distill.losses.linear import linear_kd_loss
from slimtron_distill.mixing import INTERMEDIATE, LM, LOGITS, TOTAL, LossMixer
from slimtron_distill.model.distillation import DistillationModel
from slimtron_distill.model.head import linear_head, output_head
from slimtron_distill.model.language import language_model_loss
from slimtron_distill.model.shapes import get_tensor_shapes_adjust_fn_for_distillation

__all__ = ["DistillationTask", "distillation_task"]

Losses: TypeAlias = tuple[Tensor, Tensor, dict[str, Tensor]]


def distillation_task(
    student_chunks: Sequence[Any],
    teacher_chunks: Sequence[Any],
    config: DistillationConfig,
    context: ParallelContext,
    *,
    vocab_size: int | None = None,
    shared_vocab_size: int | None = None,
    shape_in_config: bool | None = None,
    logit_bytes: int | None = None,
) -> DistillationTask:
    """Puts a student and its teacher together.

    Args:
        student_chunks: The student's ``GPTModel``, or its virtual pipeline chunks.
        teacher_chunks: The teacher's, as many, loaded.
        config: What the student learns.
        context: This process's place.
        vocab_size: Entries of the student's vocabulary; what its logits hold beyond is padding.
            None where there is none.
        shared_vocab_size: Entries that the teacher has, too; None for all.
        shape_in_config: Whether Megatron's schedule is to read the shape of what stages send from
            the config instead of ``adjust_tensor_shapes_fn``. None: where the pipeline is
            interleaved, whose schedule takes no function.
        logit_bytes: Memory for logits in training: with it the loss is computed along with the
            output layers, a chunk of tokens after another. That needs plain output layers, no
            language-model loss, and sequences that are cut alike in both models: elsewhere, as
            with None, all logits of a micro-batch exist.

    Raises:
        ConfigError: A layer to compare does not exist, or is computed again in the backward pass.
    """
    student_config = student_chunks[0].config
    if config.intermediate_layer_pairs and student_config.recompute_granularity == "full":
        raise ConfigError(
            "outputs of layers that are computed again in the backward pass cannot be compared",
            where="intermediate_layer_pairs",
            found="training.recompute full",
            hint="recompute attention alone (selective), or nothing",
        )
    for chunk in student_chunks:
        chunk.config.calculate_per_token_loss = True
        chunk.requires_grad_(True).train()
    if shape_in_config is None:
        shape_in_config = context.vpp_size > 1
    schedule_config = copy.copy(student_config) if shape_in_config else None
    scale = gradient_scale(schedule_config or student_config, context.device)
    models = [*student_chunks, *teacher_chunks]
    if (
        not config.skip_lm_loss
        or len({model.config.sequence_parallel for model in models}) > 1
        or not all(map(linear_head, models))
    ):
        logit_bytes = None
    chunks = [
        DistillationModel(
            student,
            teacher,
            matches=match_pairs(student, teacher, config, context, scale),
            schedule_config=schedule_config,
            with_logits=logit_bytes is None,
        )
        for student, teacher in zip(student_chunks, teacher_chunks, strict=True)
    ]
    return DistillationTask(
        chunks,
        config,
        context,
        vocab_size=vocab_size,
        shared_vocab_size=vocab_size if shared_vocab_size is None else shared_vocab_size,
        logit_bytes=logit_bytes,
    )


class DistillationTask:
    """What the training loop trains, with its forward step and loss.

    Args:
        chunks: This process's chunks.
        config: What the student learns.
        context: This process's place.
        vocab_size: As ``distillation_task`` takes it.
        shared_vocab_size: As well.
        logit_bytes: As well, where the chunks put out no logits.
    """

    def __init__(
        self,
        chunks: Sequence[DistillationModel],
        config: DistillationConfig,
        context: ParallelContext,
        *,
        vocab_size: int | None,
        shared_vocab_size: int | None,
        logit_bytes: int | None = None,
    ) -> None:
        self.chunks: Sequence[nn.Module] = chunks
        self.student_chunks: Sequence[nn.Module] = [chunk.module for chunk in chunks]
        # The function reads the shapes that the schedule gives it.
        self.adjust_tensor_shapes_fn: Callable[..., Any] | None = (
            get_tensor_shapes_adjust_fn_for_distillation(list(chunks), 0, 0)
        )
        self.mixer = LossMixer(config)
        self._config, self._context = config, context
        self._vocab_size, self._shared_vocab_size = vocab_size, shared_vocab_size
        self._logit_bytes = logit_bytes
        self._matches = [match for chunk in chunks for match in chunk.matches]
        self._sequence_parallel = chunks[0].module.config.sequence_parallel

    @property
    def pair_weight(self) -> float:
        """Factor of each pair's loss, summed over tokens, in the total of the current step."""
        return self.mixer.weights.intermediate / max(1, len(self._config.intermediate_layer_pairs))

    def forward_step(
        self, iterator: Iterator[Any], model: nn.Module
    ) -> tuple[Any, Callable[[Any], Losses]]:
        """Runs the next micro-batch through a chunk.

        Args:
            iterator: Of mappings with ``tokens``, ``labels`` and ``loss_mask``, each ``[b, s]``.
            model: One of ``chunks``, or its wrapper.

        Returns:
            What the chunk puts out, and the loss function for the last stage: the sum of the
            losses over tokens, the number of tokens that count, and ``[sum, count]`` of each
            loss on its own.
        """
        batch = next(iterator)
        whole = batch["tokens"], batch["labels"], batch["loss_mask"]
        positions = torch.arange(whole[0].shape[1], device=whole[0].device).expand_as(whole[0])
        rank, size = self._context.cp_rank, self._context.cp_size
        tokens, labels, mask, positions = (
            cut_over_context(tensor, rank, size) for tensor in (*whole, positions)
        )
        output = model(
            tokens,
            positions,
            loss_mask=mask,
            intermediate_weight=self.pair_weight,
        )

        def loss_function(output: Any) -> Losses:
            return self.losses(output, labels, mask)

        return output, loss_function

    def collect(
        self, losses: Sequence[Mapping[str, Tensor]], *, across_stages: bool = True
    ) -> dict[str, Tensor]:
        """Adds up the losses of one step, those of hidden states on other stages among them.

        Every process calls it after the schedule.

        Args:
            losses: What the loss function said of each micro-batch: nothing but on the last stage.
            across_stages: Whether to add up the pipeline's stages, which all must call it then.

        Returns:
            ``[sum, count]`` fp64 of each loss as it is, unweighted, and of the total that was
            optimised; of this data- and context-parallel process alone, the same on the others
            of its model replica.
        """
        names = self._names()
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._context.device)
        for part in losses:
            for i, name in enumerate(names):
                if name in part:
                    sums[i] += part[name][0]
            sums[-1] += next(iter(part.values()))[1]
        hidden = torch.zeros_like(sums)
        for match in self._matches if self.chunks[0].training else ():
            hidden[names.index(_name(match.pair))] = match.loss_sum
            match.reset()
        if self._sequence_parallel:
            dist.all_reduce(hidden, group=self._context.tp_group)
        sums += hidden
        if across_stages and self._context.pp_size > 1:
            dist.all_reduce(sums, group=self._context.pp_group)
        means = dict(zip(names, sums[:-1], strict=True))
        pairs = [means[name] for name in names if name.startswith(INTERMEDIATE)]
        if pairs:
            means[INTERMEDIATE] = sum(pairs[1:], pairs[0]) / len(pairs)
        means[TOTAL] = self.mixer.weights.total(means) if LOGITS in means else means[LM]
        return {name: torch.stack([value, sums[-1]]) for name, value in means.items()}

    def observe(self, losses: Mapping[str, float]) -> None:
        """Takes the means of the step that is done: the same on every process."""
        self.mixer.observe(losses)

    def state_dict(self) -> dict[str, float]:
        """The state of dynamic weights."""
        return self.mixer.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.mixer.load_state_dict(state)

    def extra_parameters(self) -> dict[str, nn.Parameter]:
        """The projections of this stage, by the names of the layers that they serve."""
        return {
            f"projection.{match.pair[0]}-{match.pair[1]}": next(match.projection.parameters())
            for match in self._matches
            if match.projection is not None
        }

    def _names(self) -> list[str]:
        if not self.chunks[0].training:
            return [LM]
        lm = [] if self._config.skip_lm_loss else [LM]
        return [LOGITS, *lm, *map(_name, self._config.intermediate_layer_pairs)]

    def losses(self, output: Any, labels: Tensor, mask: Tensor) -> Losses:
        """The loss of what the last stage put out.

        Args:
            output: The student's and the teacher's logits, each ``[b, s, v/tp]``, or the inputs of
                their output layers, each ``[s, b, h]``; in eval mode the student's logits alone.
            labels: ``[b, s]`` int64.
            mask: ``[b, s]``, the factor of each token.

        Returns:
            The sum over tokens, the number of tokens that count, ``[sum, count]`` of each part.
        """
        if isinstance(output, Tensor):
            return self._language_loss(output, labels, mask)
        student, teacher = output
        if self._logit_bytes is None:
            kd = kd_loss(
                student,
                teacher,
                self._config.criterion,
                weights=mask,
                group=self._context.tp_group,
                vocab_size=self._shared_vocab_size,
                # Nobody else needs the logits then.
                inplace=self._config.skip_lm_loss,
            )
        else:
            kd = self._linear_loss(student, teacher, mask, self._logit_bytes)
        weights, count = self.mixer.weights, (mask != 0).sum()
        total, parts = weights.logits * kd, {LOGITS: _part(kd, count)}
        if not self._config.skip_lm_loss:
            lm, _, lm_parts = self._language_loss(student, labels, mask)
            total, parts = total + weights.lm * lm, {**parts, **lm_parts}
        return total, count.int(), parts

    def _linear_loss(
        self, student: Tensor, teacher: Tensor, mask: Tensor, logit_bytes: int
    ) -> Tensor:
        model: Any = self.chunks[-1]
        weight, bias = output_head(model.module)
        teacher_weight, teacher_bias = output_head(model.teacher)
        # Without a loss scale of Megatron's, which changes, what will arrive is known.
        known = model.config.grad_scale_func is None
        return linear_kd_loss(
            student,
            weight,
            teacher,
            teacher_weight,
            self._config.criterion,
            student_bias=bias,
            teacher_bias=teacher_bias,
            weights=mask.t(),
            group=self._context.tp_group,
            sequence_parallel=self._sequence_parallel,
            vocab_size=self._shared_vocab_size,
            main_grad=getattr(weight, "main_grad", None) if known else None,
            gradient_scale=self.mixer.weights.logits,
            logit_bytes=logit_bytes,
        )

    def _language_loss(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Losses:
        loss = language_model_loss(
            logits, labels, mask, group=self._context.tp_group, vocab_size=self._vocab_size
        )
        count = (mask != 0).sum()
        return loss, count.int(), {LM: _part(loss, count)}


def _name(pair: tuple[str, str]) -> str:
    """A pair's own name in the logs."""
    return f"{INTERMEDIATE}/{pair[0]}-{pair[1]}"


def _part(loss: Tensor, count: Tensor) -> Tensor:
    return torch.stack([loss.detach().float(), count.float()])
