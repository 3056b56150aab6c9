"""NeMo 2's Lightning model of a distillation."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from slimtron_common.errors import (
    ConfigError,
    MissingDependencyError,
    ParallelismError,
    UnsupportedModelError,
)
from slimtron_common.parallel import ParallelContext
from slimtron_distill.config import load_distillation_config
from slimtron_distill.model.task import DistillationTask, distillation_task
from slimtron_distill.model.teacher import teacher_provider

try:
    from nemo.collections import llm
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"DistillationGPTModel is a model of NeMo 2, and {error.name} is not installed",
        hint="pip install 'nemo-toolkit[lightning]==2.7.3', or train with slimtron-distill, which "
        "does without NeMo",
    ) from error

__all__ = ["DistillationGPTModel", "build_model", "model_class"]

_WRAPPERS = re.compile(r"^(module\.)+")

_SHARED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
    "params_dtype",
    "bf16",
    "fp16",
    "autocast_dtype",
    "enable_autocast",
)
"""What the teacher's config takes from the student's."""


def model_class(config: Any) -> Any:
    """Finds NeMo's class of a model by its config's: the one that stands in the same module."""
    for cls in type(config).__mro__:
        for found in vars(sys.modules[cls.__module__]).values():
            if (
                isinstance(found, type)
                and found.__module__ == cls.__module__
                and llm.GPTModel in (found, *found.__bases__)
            ):
                return found
    return llm.GPTModel


def build_model(config: Any, tokenizer: Any) -> Any:
    """Builds Megatron-Core's model of a config, and what NeMo's class of it adds.

    A config alone makes a Gemma whose embeddings are not scaled.

    Args:
        config: ``llm.GPTConfig``.
        tokenizer: NeMo's.
    """
    model = model_class(config)(config, tokenizer=tokenizer)
    model.configure_model()
    return model.module


class DistillationGPTModel(llm.GPTModel):  # type: ignore[misc]
    """A student that NeMo 2's trainer distils a teacher into; NeMo's class of this name.

    Checkpoints hold the student alone and open as its own class, NeMo's for its config. Losses are
    weighed token by token over the whole batch (``calculate_per_token_loss``), so the trainer's
    data parallelism must not average (``average_in_collective=False``).

    NeMo hands the loss mask to the last pipeline stage alone, so hidden states are compared there;
    in an interleaved pipeline nothing is distilled. ``slimtron-distill`` does both.

    Args:
        config: The student.
        teacher_config: The teacher. Its parallel sizes and types become the student's.
        teacher_ckpt_path: The teacher's weights, as ``teacher_provider`` takes them.
        distillation_config_path: A file of ``DistillationConfig``; None for its defaults.
        optim: NeMo's optimizer.
        tokenizer: NeMo's tokenizer, the student's and the teacher's.
        model_transform: As NeMo takes it.

    Raises:
        ParallelismError: The pipeline is interleaved.
    """

    def __init__(
        self,
        config: Any,
        teacher_config: Any,
        teacher_ckpt_path: str,
        distillation_config_path: str | None = None,
        optim: Any = None,
        tokenizer: Any = None,
        model_transform: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__(config, optim, tokenizer, model_transform)
        self.__io__ = _student_call(self.__io__, model_class(config))  # type: ignore[has-type]
        if config.virtual_pipeline_model_parallel_size is not None:
            raise ParallelismError(
                "under NeMo an interleaved pipeline cannot distil",
                where="virtual_pipeline_model_parallel_size",
                found=config.virtual_pipeline_model_parallel_size,
                allowed="None",
                hint="train with slimtron-distill, which can",
            )
        self._training_loss_reduction: Any = None
        self._teacher_config = teacher_config
        self._teacher_ckpt_path = teacher_ckpt_path
        self._distillation_config_path = distillation_config_path

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds the student and loads the teacher.

        Raises:
            ConfigError: The vocabularies differ, or a pair of layers cannot be compared.
        """
        if hasattr(self, "module"):
            return
        student_config, teacher_config = self.config, self._teacher_config
        for name in _SHARED:
            setattr(teacher_config, name, getattr(student_config, name))
        config = load_distillation_config(
            self._distillation_config_path, student_config, teacher_config
        )
        sizes = [getattr(c, "vocab_size", None) for c in (student_config, teacher_config)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                "student and teacher differ in vocabulary",
                where="teacher_config.vocab_size",
                found=sizes[1],
                allowed=sizes[0],
            )
        context = ParallelContext.from_megatron(sequence_parallel=student_config.sequence_parallel)
        student = build_model(student_config, self.tokenizer)
        teacher = teacher_provider(
            teacher_config, self._teacher_ckpt_path, self.tokenizer, self._trainer
        )
        # NeMo moves what it sees, and does not see the teacher.
        teacher.to(context.device, student_config.params_dtype)
        self._task = distillation_task(
            [student],
            [teacher],
            config,
            context,
            vocab_size=None if self.tokenizer is None else self.tokenizer.vocab_size,
            shape_in_config=context.pp_size > 1,
        )
        model: Any = self._task.chunks[0]
        if model.matches and not student.post_process:
            raise ParallelismError(
                "NeMo gives the loss mask to the last pipeline stage alone",
                where="intermediate_layer_pairs",
                found=[list(match.pair) for match in model.matches],
                hint="pair layers of the last stage, or train with slimtron-distill",
            )
        self.module = model

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads the student's alone, whatever NeMo has wrapped around it."""
        # Only in front: the word may stand inside a name, too.
        own = {_WRAPPERS.sub("", name): value for name, value in state_dict.items()}
        return self._task.chunks[0].load_state_dict(own, *args, **kwargs)

    def forward_step(self, batch: dict[str, Tensor]) -> Any:
        """Runs both models in training, and the student as ever in validation."""
        if not self.training:
            return super().forward_step(batch)
        return self.module(
            batch.get("tokens"),
            batch.get("position_ids"),
            batch.get("attention_mask"),
            loss_mask=batch.get("loss_mask"),
            intermediate_weight=self._task.pair_weight,
        )

    @property
    def training_loss_reduction(self) -> Any:
        """NeMo's reduction, of the distillation's losses."""
        if self._training_loss_reduction is None:
            self._training_loss_reduction = _DistillationLossReduction(self._task)
        return self._training_loss_reduction

    def on_validation_model_train(self) -> None:
        """Goes back to training by ``train()``: Lightning would set the flags behind its back."""
        self.trainer.model.train()

    def get_inference_wrapper(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: a checkpoint opened as the student's own class can be asked for it."""
        raise UnsupportedModelError(
            "a distillation does not generate text",
            hint="open its checkpoint as the student's own class, and generate with that",
        )


def _student_call(call: Any, student_class: Any) -> Any:
    """Turns what NeMo saves of a distillation into the same call of the student's class."""
    names = ("config", "optim", "tokenizer", "model_transform")
    given = call.__arguments__
    return type(call)(student_class, **{name: given[name] for name in names if name in given})


class _DistillationLossReduction(MaskedTokenLossReduction):  # type: ignore[misc]
    """The sum of the losses of a micro-batch over its tokens."""

    def __init__(self, task: DistillationTask) -> None:
        super().__init__()
        self._task = task

    def forward(
        self, batch: dict[str, Tensor], forward_out: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, count, parts = self._task.losses(forward_out, batch["labels"], batch["loss_mask"])
        # Only this stage is here; no other has a loss.
        total = self._task.collect([parts], across_stages=False)["loss"].to(loss)
        return loss, count, {"loss_sum_and_ub_size": total}
