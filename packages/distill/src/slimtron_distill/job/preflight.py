"""Everything that can be refused before the weights load, and what the job will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from slimtron_common.atomic import check_writable
from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.config import to_dict
from slimtron_common.data import TokenDataset
from slimtron_common.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    ParallelismError,
)
from slimtron_common.evaluation.reference import reference_bytes
from slimtron_common.integrations.versions import installed_versions
from slimtron_common.memory import check_memory, shard_parameters
from slimtron_common.models.hybrid import refuse_hybrid
from slimtron_common.parallel.context import (
    check_world_size,
    resolve_device,
    world_size_from_environment,
)
from slimtron_common.parallel.context_parallel import check_sequence_cut
from slimtron_common.workdir import check_resumable
from slimtron_distill.cache.store import INDEX_NAME, TeacherCache, cache_identity
from slimtron_distill.job.config import DistillJobConfig
from slimtron_distill.job.memory import training_memory
from slimtron_distill.job.text import check_text, open_text
from slimtron_distill.layers import check_layer_pairs
from slimtron_distill.vocabulary import shared_vocab_size

__all__ = ["Plan", "preflight"]

_CHANGEABLE = (
    "parallel",
    "virtual_pipeline_size",
    "device",
    "layer_spec",
    "teacher",
    "checkpoints",
    "logging",
    # A run that was stopped may go on with bad updates left out.
    "guard",
)
"""What may be another when a run is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job that may start: its inputs are open and every check has passed."""

    config: DistillJobConfig
    student: Checkpoint
    teacher: Checkpoint | None
    """None where everything of it comes from the cache."""

    teacher_facts: Mapping[str, Any]
    """``name``, ``parameters`` and ``bytes`` of the teacher."""

    cache: Mapping[str, Any] | None
    """What the teacher's cache is of; None where the teacher runs along."""

    vocab_size: int
    """Entries of the vocabulary that both models share."""

    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    export_dtype: torch.dtype
    held_out: TokenDataset
    training: TokenDataset
    """Sequences one token longer than ``training.seq_length``."""

    world_size: int
    memory: Mapping[str, float]
    """Bytes that one process holds while it trains, by part."""

    disk: int
    """Bytes of the output and of what is kept until the job is over."""

    identity: dict[str, Any]
    """What makes this job this job, for ``--resume``; not the layout."""

    @property
    def data_parallel_size(self) -> int:
        """Copies of the student that are trained side by side."""
        return self.world_size // self.config.parallel.model_parallel_size


def preflight(
    config: DistillJobConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    world_size: int | None = None,
) -> Plan:
    """Checks a job against its models, its text, the machine and the disk.

    Reads headers and text, never weights. Cheap checks come first.

    Args:
        config: The job.
        resume: Whether an unfinished run is to be gone on with.
        overwrite: Whether existing output may be replaced.
        world_size: Processes that the job will have; those that were started without it.

    Raises:
        SlimtronError: What is wrong and what to do, with exit code 2.
    """
    device = resolve_device(config.device)
    world_size = world_size or world_size_from_environment()
    parallel = config.parallel
    check_world_size(parallel, world_size)
    data_parallel_size = world_size // parallel.model_parallel_size
    config.training.num_micro_batches(data_parallel_size)
    _check_tensorboard(config)
    student = open_checkpoint(
        config.student, where="student", trust_remote_code=config.trust_remote_code
    )
    teacher = None
    if config.teacher is not None:
        teacher = open_checkpoint(
            config.teacher, where="teacher", trust_remote_code=config.trust_remote_code
        )
        check_layer_pairs(
            config.distillation.intermediate_layer_pairs,
            student.architecture.num_layers,
            teacher.architecture.num_layers,
            num_stages=parallel.pipeline_parallel_size * config.virtual_pipeline_size,
        )
    models = [student] if teacher is None else [student, teacher]
    if config.export.export_format == "hf":
        student.check_unquantized(
            "student", loss="an hf export would lose: --export-format megatron keeps them"
        )
    _check_modelopt(models)
    for name, checkpoint in zip(("student", "teacher"), models, strict=False):
        refuse_hybrid(checkpoint.architecture, name)
    _check_layout(config, models)
    _check_lengths(config, models)
    teacher_facts, vocab_size = _teacher(config, student, teacher)
    check_text(config)
    dtype = _compute_dtype(config, device)
    export_dtype = (
        student.dtype if config.export.dtype == "auto" else getattr(torch, config.export.dtype)
    )
    memory = training_memory(
        config,
        student,
        None if config.teacher_cache.path else teacher,
        dtype=dtype,
        device=device,
        data_parallel_size=data_parallel_size,
    )
    disk = _disk(config, student, dtype, export_dtype)
    check_writable(
        config.output,
        # A resumed run replaces nothing: its output is not there, or is its own.
        overwrite=overwrite or resume,
        required_bytes=0 if resume else disk,
    )
    check_memory(
        memory,
        device,
        hint="raise tensor_parallel_size or pipeline_parallel_size, lower micro_batch_size or "
        "seq_length, or set training.recompute",
    )
    if teacher is not None and teacher.weights_are_bytes:
        # The student comes when its weights are packed.
        loading = shard_parameters(teacher, parallel) * dtype.itemsize
        check_memory({"teacher": loading}, device, hint="raise tensor_parallel_size")
    held_out, training = open_text(config, student.tokenizer())
    if held_out.num_sequences < data_parallel_size:
        raise ConfigError(
            "every data-parallel process needs a sequence",
            where="evaluation.num_tokens",
            found=f"{held_out.num_sequences} sequences",
            allowed=f"{data_parallel_size} or more",
        )
    cache = _cache(config, teacher, teacher_facts, vocab_size, held_out, training)
    identity = _identity(config, student, teacher_facts, held_out, training)
    check_resumable(config.output, identity, resume=resume, overwrite=overwrite)
    return Plan(
        config=config,
        student=student,
        teacher=teacher,
        teacher_facts=teacher_facts,
        cache=cache,
        vocab_size=vocab_size,
        device=device,
        dtype=dtype,
        export_dtype=export_dtype,
        held_out=held_out,
        training=training,
        world_size=world_size,
        memory=memory,
        disk=disk,
        identity=identity,
    )


def _check_tensorboard(config: DistillJobConfig) -> None:
    if config.logging.tensorboard is not None and not installed_versions(("tensorboard",)):
        raise MissingDependencyError(
            "TensorBoard is not installed",
            where="logging.tensorboard",
            hint="pip install 'slimtron-distill[tensorboard]'",
        )


def _check_modelopt(models: Sequence[Checkpoint]) -> None:
    quantized = [model.path for model in models if model.is_quantized]
    if quantized and not installed_versions(("nvidia-modelopt",)):
        raise MissingDependencyError(
            "the checkpoint is quantized: NVIDIA ModelOpt computes its quantizers",
            where=quantized[0],
            hint="pip install 'slimtron-distill[qad]'",
        )


def _teacher(
    config: DistillJobConfig, student: Checkpoint, teacher: Checkpoint | None
) -> tuple[Mapping[str, Any], int]:
    """What is known of the teacher, and the size of the vocabulary that both share."""
    if teacher is None:
        assert config.teacher_cache.path is not None
        identity = TeacherCache(config.teacher_cache.path).identity
        return identity["teacher"], identity["vocab_size"]
    facts = {"name": teacher.path.resolve().name, **teacher.identity}
    return facts, shared_vocab_size(student, teacher)


def _cache(
    config: DistillJobConfig,
    teacher: Checkpoint | None,
    teacher_facts: Mapping[str, Any],
    vocab_size: int,
    held_out: TokenDataset,
    training: TokenDataset,
) -> Mapping[str, Any] | None:
    """What the job's cache must be of, held against one that is there."""
    path = config.teacher_cache.path
    if path is None:
        return None
    identity = cache_identity(
        teacher=teacher_facts,
        text=training.fingerprint,
        held_out=held_out.fingerprint,
        num_sequences=training.num_sequences,
        seq_length=config.training.seq_length,
        vocab_size=vocab_size,
        top_k=config.teacher_cache.top_k,
    )
    if config.parallel.expert_parallel_size > 1:
        raise ParallelismError(
            "copies of a teacher whose experts are shared out cannot work through the text alone",
            where="parallel.expert_parallel_size",
            found=config.parallel.expert_parallel_size,
            allowed="1 with a teacher's cache",
        )
    if (path / INDEX_NAME).is_file():
        cache = TeacherCache(path)
        cache.check(identity)
        missing = cache.missing()
        if teacher is None and missing:
            raise CheckpointError(
                "the teacher's cache is not finished",
                where=path,
                found=f"{len(missing)} of {cache.num_shards} shards are missing",
                hint="run once with --teacher",
            )
    elif path.exists() and any(path.iterdir()):
        raise CheckpointError(
            "is no teacher's cache", where=path, found=f"no {INDEX_NAME}", hint="give another"
        )
    elif not path.resolve().parent.is_dir():
        raise CheckpointError("its parent does not exist", where=path)
    return identity


def _check_layout(config: DistillJobConfig, models: Sequence[Checkpoint]) -> None:
    parallel = config.parallel
    if parallel.context_parallel_size > 1 and config.teacher_cache.path is not None:
        raise ParallelismError(
            "a teacher's cache holds whole sequences",
            where="parallel.context_parallel_size",
            found=parallel.context_parallel_size,
            allowed="1 with a teacher's cache",
        )
    if config.virtual_pipeline_size > 1 and parallel.pipeline_parallel_size == 1:
        raise ParallelismError(
            "only a pipeline of several stages can be interleaved",
            where="virtual_pipeline_size",
            found=config.virtual_pipeline_size,
            allowed="1 without pipeline parallelism",
        )
    for checkpoint in models:
        checkpoint.architecture.check_parallel(
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            expert_parallel_size=parallel.expert_parallel_size,
            virtual_pipeline_size=config.virtual_pipeline_size,
        )


def _check_lengths(config: DistillJobConfig, models: Sequence[Checkpoint]) -> None:
    limit = min(c.architecture.max_position_embeddings for c in models)
    for where, length in (
        ("training.seq_length", config.training.seq_length),
        ("evaluation.seq_length", config.evaluation.seq_length),
    ):
        if length > limit:
            raise ConfigError(
                "sequences are longer than the models' positions",
                where=where,
                found=length,
                allowed=f"at most {limit}",
            )
        check_sequence_cut(length, config.parallel.context_parallel_size, where=where)


def _compute_dtype(config: DistillJobConfig, device: str) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _disk(
    config: DistillJobConfig, student: Checkpoint, dtype: torch.dtype, export_dtype: torch.dtype
) -> int:
    parameters = student.num_parameters
    # The teacher's logits on the held-out text, and the student's.
    logits = 2 * reference_bytes(
        config.evaluation.num_tokens, student.architecture.vocab_size, dtype
    )
    # Weights, and in fp32 those of the optimizer and two moments; one more than are kept is there
    # while it is being written.
    checkpoint = parameters * (dtype.itemsize + 12)
    return logits + parameters * export_dtype.itemsize + (config.checkpoints.keep + 1) * checkpoint


def _identity(
    config: DistillJobConfig,
    student: Checkpoint,
    teacher: Mapping[str, Any],
    held_out: TokenDataset,
    training: TokenDataset,
) -> dict[str, Any]:
    settings = {k: v for k, v in to_dict(config).items() if k not in _CHANGEABLE}
    for name in ("micro_batch_size", "recompute", "logit_memory"):
        del settings["training"][name]
    return {
        "config": settings,
        "student": student.identity,
        "teacher": dict(teacher),
        "held_out": held_out.fingerprint,
        "training": training.fingerprint,
    }
