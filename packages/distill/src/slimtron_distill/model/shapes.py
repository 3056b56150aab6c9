"""What Megatron's pipeline schedule has to know of the hidden states that it sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from megatron.core import parallel_state
from torch import nn

from slimtron_distill.model.distillation import DistillationModel
from slimtron_distill.model.modelopt import is_modelopt_model
from slimtron_distill.model.packing import Packing

__all__ = ["get_tensor_shapes_adjust_fn_for_distillation"]

Shapes: TypeAlias = Sequence[Sequence[int]]
AdjustShapes: TypeAlias = Callable[[Shapes, Shapes], tuple[list[tuple[int, ...]], ...]]


def get_tensor_shapes_adjust_fn_for_distillation(
    model: nn.Module | list[nn.Module],
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
) -> AdjustShapes | None:
    """Returns what Megatron's schedule takes as ``adjust_tensor_shapes_fn``.

    Args:
        model: A distillation model, its wrapper, or a list of chunks.
        seq_length: Tokens in a sequence; NeMo's argument. The shapes that the schedule hands to
            the function already tell it.
        micro_batch_size: As well.
        decoder_seq_length: As well.
        forward_only: Whether the student runs alone, to be evaluated.

    Returns:
        A function of the shapes that a stage would receive and send for the student alone; it
        returns them for student and teacher together, and as they are while the model is in eval
        mode. None where nothing need change: without a pipeline, in an interleaved one (whose
        schedule takes no function) or elsewhere if the model's config already tells the shape,
        with ``forward_only``, and for other models.
    """
    if (
        forward_only
        or parallel_state.get_pipeline_model_parallel_world_size() == 1
        or parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    ):
        return None
    holder = _find(model[0] if isinstance(model, list) else model)
    if holder is None or getattr(holder, "shape_in_config", False):
        return None

    def adjust(recv: Shapes, send: Shapes) -> tuple[list[tuple[int, ...]], ...]:
        if not holder.training:
            return [tuple(shape) for shape in recv], [tuple(shape) for shape in send]
        packing = _packing(holder)
        return (
            [packing.adjust(shape) for shape in recv],
            [packing.adjust(shape) for shape in send],
        )

    return adjust


def _find(model: Any) -> Any:
    """The distillation model inside its wrappers; None if there is none."""
    while model is not None and not isinstance(model, DistillationModel):
        if is_modelopt_model(model):
            return model
        model = getattr(model, "module", None)
    return model


def _packing(model: Any) -> Packing:
    if isinstance(model, DistillationModel):
        return model.packing
    return Packing.of(model.config, model.teacher_model.config)
