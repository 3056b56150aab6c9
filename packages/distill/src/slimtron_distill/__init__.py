"""Knowledge distillation of Megatron-Core and NeMo 2 language models, at any parallelism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimtron_distill.__about__ import __version__
from slimtron_distill.config import DistillationConfig, load_distillation_config
from slimtron_distill.losses import LogitLossSettings

if TYPE_CHECKING:
    from slimtron_distill.losses import kd_loss
    from slimtron_distill.model.distillation import DistillationModel
    from slimtron_distill.model.modelopt import adjust_distillation_model_for_mcore
    from slimtron_distill.model.nemo import DistillationGPTModel
    from slimtron_distill.model.shapes import get_tensor_shapes_adjust_fn_for_distillation
    from slimtron_distill.model.task import distillation_task
    from slimtron_distill.model.teacher import load_teacher, teacher_provider

__all__ = [
    "DistillationConfig",
    "DistillationGPTModel",
    "DistillationModel",
    "LogitLossSettings",
    "__version__",
    "adjust_distillation_model_for_mcore",
    "distillation_task",
    "get_tensor_shapes_adjust_fn_for_distillation",
    "kd_loss",
    "load_distillation_config",
    "load_teacher",
    "teacher_provider",
]

# These need torch and Megatron-Core, for which a command's --help must not wait, or NeMo.
_HOMES = {
    "DistillationGPTModel": "model.nemo",
    "DistillationModel": "model.distillation",
    "adjust_distillation_model_for_mcore": "model.modelopt",
    "distillation_task": "model.task",
    "get_tensor_shapes_adjust_fn_for_distillation": "model.shapes",
    "kd_loss": "losses",
    "load_teacher": "model.teacher",
    "teacher_provider": "model.teacher",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"slimtron_distill.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
