"""What the student learns from the teacher, and how much each part counts.

Names and defaults are those of NeMo 2's ``llm.modelopt``; where one differs, the field says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimtron_common.errors import ConfigError
from slimtron_distill.layers import check_layer_pairs, parse_layer
from slimtron_distill.losses.settings import LogitLossSettings

__all__ = ["DistillationConfig", "load_distillation_config"]


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """The losses of a distillation and their weights.

    The total is ``logits_loss + intermediate_loss_scale * intermediate_loss`` without the
    language-model loss, and ``lm_loss + kd_loss_scale * (logits_loss + intermediate_loss_scale *
    intermediate_loss)`` with it. ``intermediate_loss`` is the mean over the pairs of layers.
    """

    intermediate_layer_pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of a student's and a teacher's module whose outputs are compared, by their names in
    the whole model, with layers counted from 0: ``[decoder.layers.2, decoder.layers.5]``. Also
    ``embedding``, ``decoder.final_layernorm``, and modules inside a layer that put out the hidden
    state. The two of a pair must lie on the same pipeline stage, be it the last one or not; NeMo
    knew the last alone."""

    logit_layers: tuple[str, str] = ("output_layer", "output_layer")
    """Where the logits come from. A Megatron model has no other place."""

    skip_lm_loss: bool = True
    """Whether to leave out the loss against the text itself."""

    kd_loss_scale: float = 1.0
    """Weight of what is learned from the teacher; it counts only beside the language-model
    loss."""

    criterion: LogitLossSettings = field(default_factory=LogitLossSettings)
    """The loss on the logits. NeMo put its own in place of what a file said."""

    loss_balancer: Literal["fixed", "dynamic"] = "fixed"
    """``fixed`` multiplies losses by the scales alone. ``dynamic`` also brings the intermediate
    loss to the size of the logits' loss, and these two to the size of the language-model loss, by
    factors from the means of the step before: the same on every process and for every cut of the
    batch. NeMo's factors came from each micro-batch of each process."""

    intermediate_criterion: Literal["cosine", "mse"] = "cosine"
    """How two hidden states are compared, token by token: 1 less their cosine, or the mean over
    channels of their squared difference."""

    intermediate_loss_scale: float = 1.0
    """Weight of the intermediate loss relative to the logits' loss."""

    max_dynamic_scale: float = 100.0
    """The dynamic factors stay between this and its inverse."""

    def __post_init__(self) -> None:
        pairs = tuple(tuple(pair) for pair in self.intermediate_layer_pairs)
        object.__setattr__(self, "intermediate_layer_pairs", pairs)
        object.__setattr__(self, "logit_layers", tuple(self.logit_layers))
        for pair in pairs:
            if len(pair) != 2:
                raise ConfigError(
                    "a pair is one layer of the student and one of the teacher",
                    where="intermediate_layer_pairs",
                    found=list(pair),
                )
            for name in pair:
                parse_layer(name)
        if len(set(pairs)) < len(pairs):
            raise ConfigError(
                "a pair is given twice", where="intermediate_layer_pairs", found=list(pairs)
            )
        if self.logit_layers != ("output_layer", "output_layer"):
            raise ConfigError(
                "the logits of a Megatron model come from its output layer",
                where="logit_layers",
                found=list(self.logit_layers),
                allowed="[output_layer, output_layer]",
            )
        for name, minimum in (
            ("kd_loss_scale", 0.0),
            ("intermediate_loss_scale", 0.0),
            ("max_dynamic_scale", 1.0),
        ):
            value = getattr(self, name)
            if not minimum < value < float("inf"):
                raise ConfigError(
                    "is out of range", where=name, found=value, allowed=f"a number above {minimum}"
                )


def load_distillation_config(
    config_path: str | Path | None, student_cfg: Any, teacher_cfg: Any
) -> DistillationConfig:
    """Reads a distillation's YAML file and holds it against the two models.

    Args:
        config_path: The file; None for the defaults, which learn from the logits alone.
        student_cfg: The student's ``TransformerConfig``, or an ``Architecture``.
        teacher_cfg: The teacher's.

    Raises:
        ConfigError: A field is unknown or has an impossible value, or a layer does not exist.
        ParallelismError: The layers of a pair lie on different pipeline stages.
    """
    from slimtron_common.config import build_config

    config = build_config(DistillationConfig, file=Path(config_path) if config_path else None)
    check_layer_pairs(
        config.intermediate_layer_pairs,
        student_cfg.num_layers,
        teacher_cfg.num_layers,
        num_stages=getattr(student_cfg, "pipeline_model_parallel_size", 1)
        * (getattr(student_cfg, "virtual_pipeline_model_parallel_size", None) or 1),
    )
    return config
