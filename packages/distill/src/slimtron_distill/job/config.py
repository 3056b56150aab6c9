"""The settings of a distillation job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slimtron_common.errors import ConfigError
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.parallel.config import ParallelConfig
from slimtron_distill.config import DistillationConfig
from slimtron_distill.training.config import (
    CheckpointConfig,
    GuardConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = ["DistillJobConfig", "ExportConfig", "LogConfig", "TeacherCacheConfig", "TextConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text to train on."""

    source: str = "pydoc"
    """``pydoc``, a file (``.txt``, ``.jsonl``, ``.json``, ``.parquet``), or
    ``hf:NAME[,CONFIG][:SPLIT]``."""

    text_field: str = "text"
    """Field of a record that holds the text."""

    num_tokens: int | None = None
    """How many tokens to take at most; None for as many as the steps need, or as there are. When
    they are used up they come again, in another order."""

    def __post_init__(self) -> None:
        if self.num_tokens is not None and self.num_tokens < 1:
            raise ConfigError(
                "is too small", where="num_tokens", found=self.num_tokens, allowed="1 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is told, and measured, while the training runs."""

    interval: int = 10
    """Steps between two lines on the terminal; the file ``train.jsonl`` has them all."""

    evaluation_interval: int | None = 100
    """Steps between two measurements on the held-out text; None for none before the end."""

    tensorboard: Path | None = None
    """A directory for TensorBoard's event files; needs the extra ``tensorboard``."""

    def __post_init__(self) -> None:
        for name in ("interval", "evaluation_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("counts steps", where=name, found=value, allowed="1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCacheConfig:
    """The teacher's largest logits, computed before the training and kept for later runs."""

    path: Path | None = None
    """The directory; None for a teacher that runs along."""

    top_k: int = 64
    """How many logits are kept of each token. Student and teacher are compared over these."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError("is too small", where="top_k", found=self.top_k, allowed="1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """How the student is written."""

    export_format: Literal["hf", "megatron", "nemo"] = "hf"
    """A Hugging Face directory, a Megatron distributed checkpoint, or one of NeMo 2."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; ``auto``: as the student came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillJobConfig:
    """One job: which student learns what from which teacher, how, written where."""

    student: str
    """``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``."""

    teacher: str | None = None
    """``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``; not needed with a
    finished ``teacher_cache``."""

    output: Path
    """The directory to write."""

    training: TrainingConfig
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    data: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LogConfig = field(default_factory=LogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out text; without a source of its own the first tokens of ``data``, which are then not
    trained on."""

    teacher_cache: TeacherCacheConfig = field(default_factory=TeacherCacheConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    virtual_pipeline_size: int = 1
    """Chunks of the model on every pipeline stage; more than one interleaves the pipeline."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that both models compute in; ``auto``: bfloat16 on a GPU, float32 on the CPU. Gradients
    and the optimizer's weights are float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    seed: int = 1234
    """Seeds the order of the text and everything random."""

    trust_remote_code: bool = False
    """Whether the tokenizers may run code that comes with the models."""

    def __post_init__(self) -> None:
        if self.teacher is None and self.teacher_cache.path is None:
            raise ConfigError(
                "there is nobody to learn from",
                where="teacher",
                found=None,
                allowed="hf:DIR, megatron:DIR, or a teacher_cache.path that is finished",
            )
        if self.teacher_cache.path and self.distillation.intermediate_layer_pairs:
            raise ConfigError(
                "a cache holds no hidden states",
                where="teacher_cache.path",
                found="distillation.intermediate_layer_pairs is not empty",
                hint="compare logits alone, or let the teacher run along",
            )
        if self.training.recompute == "full" and self.distillation.intermediate_layer_pairs:
            raise ConfigError(
                "outputs of layers that are computed again in the backward pass cannot be compared",
                where="training.recompute",
                found="full with distillation.intermediate_layer_pairs",
                allowed="selective or none",
            )
        if self.virtual_pipeline_size < 1:
            raise ConfigError(
                "counts chunks of the model",
                where="virtual_pipeline_size",
                found=self.virtual_pipeline_size,
                allowed="1 or more",
            )
        if self.optimizer.warmup_steps >= self.training.steps:
            raise ConfigError(
                "the warm-up must end before the training",
                where="optimizer.warmup_steps",
                found=self.optimizer.warmup_steps,
                allowed=f"below training.steps {self.training.steps}",
            )
