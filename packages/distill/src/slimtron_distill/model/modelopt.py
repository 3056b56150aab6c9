"""ModelOpt's ``DistillationModel`` under Megatron-Core, as NeMo 2 makes one."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from slimtron_common.errors import UnsupportedModelError
from slimtron_distill.config import DistillationConfig
from slimtron_distill.model.distillation import DistillationModel
from slimtron_distill.model.packing import Packing

__all__ = ["adjust_distillation_model_for_mcore", "is_modelopt_model"]


def is_modelopt_model(model: object) -> bool:
    """Tells whether ``model`` is ModelOpt's ``DistillationModel``, without importing ModelOpt."""
    return any(
        cls.__name__ == "DistillationModel" and cls.__module__.startswith("modelopt.")
        for cls in type(model).__mro__
    )


def adjust_distillation_model_for_mcore(model: Any, distill_cfg: DistillationConfig) -> None:
    """Fits a model that ModelOpt's ``convert`` made for distillation to Megatron-Core, in place.

    - checkpoints, distributed ones too, hold the student alone, without a trace of ModelOpt
    - the teacher takes no gradient and stays in eval mode
    - the language-model loss is left out of training where the config says so, and always for
      the teacher
    - between pipeline stages both models' hidden states travel in one tensor; what has a place in
      the pipeline needs no step before it, so validation may come first
    - in eval mode the student runs alone

    Slimtron's own ``DistillationModel`` is made that way and left as it is.

    Args:
        model: ModelOpt's ``DistillationModel``.
        distill_cfg: Whether to leave out the language-model loss.

    Raises:
        UnsupportedModelError: It is another model.
    """
    if isinstance(model, DistillationModel):
        return
    if not is_modelopt_model(model):
        raise UnsupportedModelError(
            "no distillation model",
            found=f"{type(model).__module__}.{type(model).__qualname__}",
            allowed="slimtron_distill's DistillationModel, or modelopt.torch.distill's",
        )
    from modelopt.torch.opt import ModeloptStateManager

    if ModeloptStateManager.is_converted(model):
        ModeloptStateManager.remove_state(model)
    teacher = model.teacher_model.requires_grad_(False)
    teacher.eval()
    # The methods below stand for the student's own: it is the class that ModelOpt derived from.
    student_class = type(model)
    packing = Packing.of(model.config, teacher.config)

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.hide_teacher_model(), self.hide_loss_modules():
            return student_class.sharded_state_dict(self, *args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        student_class.train(self, mode)
        self.teacher_model.eval()
        return self

    def student_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        if distill_cfg.skip_lm_loss and self.training:
            return torch.zeros_like(labels, dtype=logits.dtype)
        loss: Tensor = student_class.compute_language_model_loss(self, labels, logits)
        return loss

    def no_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=logits.dtype)

    def set_input_tensor(self: Any, input_tensor: Any) -> None:
        packed = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        student, own = packed, None
        if self.training and packed is not None:
            student, own = packing.unpack(packed)
        self.teacher_model.set_input_tensor(own)
        student_class.set_input_tensor(self, student)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.training:
            with torch.no_grad():
                hidden = self.teacher_model(*args, **kwargs)
        with self.only_student_forward():
            output: Tensor = student_class.forward(self, *args, **kwargs)
        if self.training and not self.post_process:
            return packing.pack(output, hidden)
        return output

    for method in (sharded_state_dict, train, set_input_tensor, forward):
        setattr(model, method.__name__, MethodType(method, model))
    model.compute_language_model_loss = MethodType(student_loss, model)
    teacher.compute_language_model_loss = MethodType(no_loss, teacher)
