"""One pipeline chunk of a student with that of its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from slimtron_distill.hidden import HiddenMatch
from slimtron_distill.model.packing import Packing

__all__ = ["DistillationModel"]


class DistillationModel(MegatronModule):  # type: ignore[misc]
    """A student that takes its teacher along.

    To Megatron it is the student: the student's parameters, checkpoint and attributes (Megatron
    finds them through ``module``), and the projections of hidden states besides. The teacher is
    no submodule, so no optimizer, no checkpoint, and neither ``train()`` nor
    ``requires_grad_()`` reaches it. In eval mode the student runs alone.

    Args:
        student: Megatron-Core's ``GPTModel``, or a chunk of one.
        teacher: The teacher's chunk of the same pipeline stage, loaded.
        matches: Pairs of hidden states that are compared on this chunk.
        schedule_config: A copy of the student's config that the schedule alone reads, to tell it
            the shape of what stages send; None where ``adjust_tensor_shapes_fn`` does.
        with_logits: Whether the last stage computes logits in training; else its output layers
            are left to the loss.
    """

    module: Any
    matches: Sequence[HiddenMatch]

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        matches: Sequence[HiddenMatch] = (),
        schedule_config: Any = None,
        with_logits: bool = True,
    ) -> None:
        super().__init__(config=schedule_config or student.config)
        self.module = student
        # A list of modules, which is no Sequence to the type checker.
        self.matches = nn.ModuleList(matches)  # type: ignore[assignment]
        self.packing = Packing.of(student.config, teacher.config)
        self.shape_in_config = schedule_config is not None
        self.with_logits = with_logits
        # A tuple hides it from torch's bookkeeping of submodules.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.train(student.training)

    @property
    def teacher(self) -> Any:
        """The teacher's chunk."""
        return self._teacher[0]

    def train(self, mode: bool = True) -> DistillationModel:
        """Sets the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.shape_in_config:
            student, cut = self.module.config, self.teacher.config.sequence_parallel
            self.config.hidden_size = self.packing.width if mode else student.hidden_size
            self.config.sequence_parallel = student.sequence_parallel or (mode and cut)
        return self

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Takes what the stage before put out: a tensor or a list of one; None on the first."""
        packed = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if not self.training or packed is None:
            self.module.set_input_tensor(packed)
            return
        student, teacher = self.packing.unpack(packed)
        self.module.set_input_tensor(student)
        self.teacher.set_input_tensor(teacher)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        loss_mask: Tensor | None = None,
        intermediate_weight: float = 0.0,
        **more: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Runs the teacher and then the student.

        Args:
            tokens: ``[b, s]`` int64.
            position_ids: ``[b, s]`` int64.
            attention_mask: Megatron's; None where attention is causal.
            loss_mask: ``[b, s]``, the factor of each token in the losses on hidden states.
            intermediate_weight: Factor of each such loss, summed over tokens, in the total.
            **more: Other arguments of ``GPTModel``, for both.

        Returns:
            In eval mode what the student puts out. In training one packed tensor, and on the last
            stage a pair, the student's and the teacher's: of logits, each ``[b, s, v/tp]``, or
            without them of the output layers' inputs, each ``[s, b, h]``.
        """
        inputs = tokens, position_ids, attention_mask
        if not self.training:
            output: Tensor = self.module(*inputs, **more)
            return output
        for match in self.matches:
            if loss_mask is None:
                loss_mask = torch.ones_like(tokens, dtype=torch.float32)
            match.begin(loss_mask, intermediate_weight)
        last_stage = self.module.post_process
        try:
            for model in (self.module, self.teacher):
                # To Megatron the output layer is what makes a stage the last one.
                model.post_process = last_stage and self.with_logits
            with torch.no_grad():
                teacher = self.teacher(*inputs, **more)
            student = self.module(*inputs, **more)
        finally:
            self.module.post_process = self.teacher.post_process = last_stage
            for match in self.matches:
                match.end()
        if last_stage:
            return student, teacher
        return self.packing.pack(student, teacher)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The student's alone, under its own names."""
        state: dict[str, Any] = self.module.state_dict(*args, **kwargs)
        return state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the student's alone."""
        return self.module.load_state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(
        self, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The student's alone, under its own names."""
        return self.state_dict(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The student's alone, under its own names, for Megatron's distributed checkpoints."""
        state: dict[str, Any] = self.module.sharded_state_dict(*args, **kwargs)
        return state
