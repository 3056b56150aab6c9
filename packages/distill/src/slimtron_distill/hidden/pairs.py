"""The pairs of layers of a distillation that lie on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimtron_common.errors import ConfigError
from slimtron_common.parallel import ParallelContext
from slimtron_distill.config import DistillationConfig
from slimtron_distill.hidden.match import HiddenMatch, find_module

__all__ = ["gradient_scale", "match_pairs"]


def match_pairs(
    student: Any,
    teacher: Any,
    config: DistillationConfig,
    context: ParallelContext,
    scale: Callable[[], Tensor | None],
) -> list[HiddenMatch]:
    """Hooks up the pairs of layers that lie on this process's part of the models.

    Args:
        student: The student's ``GPTModel``, or a chunk of one.
        teacher: The teacher's chunk of the same pipeline stage.
        config: Which layers are compared, and how.
        context: This process's place.
        scale: As ``attach_loss`` takes it.

    Raises:
        ConfigError: One of a pair lies here and the other does not, or inside a layer is no such
            module.
    """
    matches = []
    for pair in config.intermediate_layer_pairs:
        ours, theirs = find_module(student, pair[0]), find_module(teacher, pair[1])
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            raise ConfigError(
                "the two layers of a pair must lie on the same pipeline stage",
                where="intermediate_layer_pairs",
                found=list(pair),
            )
        matches.append(
            HiddenMatch(
                pair,
                ours,
                theirs,
                criterion=config.intermediate_criterion,
                widths=(student.config.hidden_size, teacher.config.hidden_size),
                dtype=student.config.params_dtype,
                device=context.device,
                sequence_parallel=(
                    student.config.sequence_parallel,
                    teacher.config.sequence_parallel,
                ),
                group=context.tp_group,
                gradient_scale=scale,
            )
        )
    return matches


def gradient_scale(config: Any, device: torch.device) -> Callable[[], Tensor | None]:
    """Makes of a ``TransformerConfig`` what ``attach_loss`` takes.

    It looks into the config in the backward pass: a training sets the function late.
    """

    def scale() -> Tensor | None:
        if config.grad_scale_func is None:
            return None
        scaled: Tensor = config.grad_scale_func(torch.ones((), device=device))
        return scaled

    return scale
