"""Everything that can be refused before the weights load, and what the job will cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from slimtron_common.atomic import check_writable
from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.config import fingerprint, to_dict
from slimtron_common.data import TokenDataset, held_out_datasets, token_dataset
from slimtron_common.data.config import DataConfig
from slimtron_common.data.sources import check_source
from slimtron_common.errors import ConfigError, ParallelismError
from slimtron_common.evaluation.reference import reference_bytes
from slimtron_common.manifest import environment_versions
from slimtron_common.memory import (
    activation_bytes,
    check_memory,
    required_memory,
    shard_parameters,
)
from slimtron_common.models import Architecture
from slimtron_common.parallel.context import (
    check_world_size,
    resolve_device,
    world_size_from_environment,
)
from slimtron_common.workdir import check_resumable
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.recipes import Recipe, Scheme, quantization_scheme

__all__ = ["Estimate", "Plan", "preflight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a job needs; sizes in bytes."""

    weights: int
    """The model's weights in one process."""

    activations: int
    """The largest of what one micro-batch makes, logits included, in one process."""

    statistics: int
    """What the calibration keeps of the activations, in one process."""

    disk: int
    """The output and what is kept until the job is over."""

    flops: float
    """Floating-point operations of all forward passes, over all processes."""

    @property
    def memory(self) -> int:
        """All of these together, with a tenth for what the libraries take."""
        return required_memory(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """What one process holds in memory at one time."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "statistics": self.statistics,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job that may start: its inputs are open and every check has passed."""

    config: QuantJobConfig
    scheme: Scheme
    """What becomes of each layer."""

    checkpoint: Checkpoint
    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    evaluation: TokenDataset
    calibration: TokenDataset | None
    """None for recipes that only round weights."""

    world_size: int
    estimate: Estimate
    identity: dict[str, Any]
    """What makes this job this job, for ``--resume``."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the layers that no pattern names."""
        return self.scheme.recipe


def preflight(
    config: QuantJobConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    world_size: int | None = None,
) -> Plan:
    """Checks a job against its model, its text, the machine and the disk.

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
    check_world_size(config.parallel, world_size)
    checkpoint = open_checkpoint(config.model, trust_remote_code=config.trust_remote_code)
    architecture, parallel = checkpoint.architecture, config.parallel
    architecture.check_parallel(
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
    )
    if parallel.context_parallel_size > 1 or parallel.expert_parallel_size > 1:
        raise ParallelismError(
            "this version quantizes dense models over tensor, pipeline and data parallelism",
            where="parallel",
            found=f"context {parallel.context_parallel_size}, expert "
            f"{parallel.expert_parallel_size}",
            allowed="context 1, expert 1",
        )
    scheme = _scheme(config, architecture, device)
    _check_lengths(config, architecture.max_position_embeddings)
    dtype = checkpoint.compute_dtype(config.dtype, device)
    estimate = _estimate(config, checkpoint, scheme, dtype)
    check_writable(
        config.output,
        # A resumed run replaces nothing: its output is not there, or is its own.
        overwrite=overwrite or resume,
        required_bytes=0 if resume else estimate.disk,
    )
    check_memory(
        estimate.parts,
        device,
        hint="raise tensor_parallel_size or pipeline_parallel_size, or lower the batch sizes and "
        "sequence lengths",
    )
    evaluation, calibration = _open_text(config, scheme, checkpoint)
    _check_sequences(evaluation, calibration, world_size // parallel.model_parallel_size)
    identity = {
        "config": to_dict(config),
        # A recipe file, or ModelOpt, may say something else by the time of a resumption.
        "recipe": fingerprint(to_dict(scheme.modelopt_config())),
        "model": {"parameters": checkpoint.num_parameters, "bytes": checkpoint.weight_bytes},
        "evaluation": evaluation.fingerprint,
        "calibration": calibration.fingerprint if calibration else None,
        "world_size": world_size,
        "device": device,
        "versions": environment_versions(),
    }
    check_resumable(config.output, identity, resume=resume, overwrite=overwrite)
    return Plan(
        config=config,
        scheme=scheme,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        evaluation=evaluation,
        calibration=calibration,
        world_size=world_size,
        estimate=estimate,
        identity=identity,
    )


def _scheme(config: QuantJobConfig, architecture: Architecture, device: str) -> Scheme:
    try:
        scheme = quantization_scheme(
            config.quantization,
            architecture,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
        )
        scheme.check_device(device)
        return scheme
    except ConfigError as error:
        # The recipes know the fields of their own config; in the job's it has a name.
        if str(error.where).partition(".")[0] in QuantizationConfig.__dataclass_fields__:
            error.where = f"quantization.{error.where}"
        raise


def _check_lengths(config: QuantJobConfig, limit: int) -> None:
    for where, length in (
        ("evaluation.seq_length", config.evaluation.seq_length),
        ("quantization.calibration_seq_len", config.quantization.calibration_seq_len),
    ):
        if length > limit:
            raise ConfigError(
                "sequences are longer than the model's positions",
                where=where,
                found=length,
                allowed=f"at most {limit}",
            )


def _open_text(
    config: QuantJobConfig, scheme: Scheme, checkpoint: Checkpoint
) -> tuple[TokenDataset, TokenDataset | None]:
    quantization, evaluation = config.quantization, config.evaluation
    calibration_source = (quantization.calibration_source, quantization.calibration_text_field)
    source = (
        calibration_source
        if evaluation.source is None
        else (evaluation.source, evaluation.text_field)
    )
    wanted = {source} | ({calibration_source} if scheme.needs_calibration else set())
    for name, text_field in sorted(wanted):
        check_source(name, text_field=text_field)
    tokenizer = checkpoint.tokenizer()
    held_out = _text(source, evaluation.num_tokens, evaluation.seq_length, config)
    if not scheme.needs_calibration:
        return token_dataset(held_out, tokenizer), None
    seq_length = quantization.calibration_seq_len
    num_tokens = quantization.calibration_dataset_size * seq_length
    work = _text(calibration_source, num_tokens, seq_length, config)
    return held_out_datasets(held_out, work, tokenizer)


def _text(
    source: tuple[str, str], num_tokens: int, seq_length: int, config: QuantJobConfig
) -> DataConfig:
    name, text_field = source
    return DataConfig(
        source=name,
        num_tokens=num_tokens,
        seq_length=seq_length,
        seed=config.seed,
        text_field=text_field,
    )


def _check_sequences(
    evaluation: TokenDataset, calibration: TokenDataset | None, data_parallel_size: int
) -> None:
    for where, dataset in (
        ("evaluation.num_tokens", evaluation),
        ("quantization.calibration_dataset_size", calibration),
    ):
        if dataset is not None and dataset.num_sequences < data_parallel_size:
            raise ConfigError(
                "every data-parallel process needs a sequence",
                where=where,
                found=f"{dataset.num_sequences} sequences",
                allowed=f"{data_parallel_size} or more",
            )


def _estimate(
    config: QuantJobConfig, checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype
) -> Estimate:
    architecture, parallel = checkpoint.architecture, config.parallel
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    parameters, itemsize = checkpoint.num_parameters, dtype.itemsize
    evaluation, quantization = config.evaluation, config.quantization
    calibrates = scheme.needs_calibration
    shapes = [(evaluation.micro_batch_size, evaluation.seq_length)]
    if calibrates:
        size = min(quantization.calibration_batch_size, quantization.calibration_dataset_size)
        shapes.append((size, quantization.calibration_seq_len))
    logits = reference_bytes(evaluation.num_tokens, architecture.vocab_size, dtype)
    rewrites_weights = scheme.recipe.rewrites_weights
    tokens = 3 * evaluation.num_tokens
    if calibrates:
        tokens += quantization.calibration_dataset_size * quantization.calibration_seq_len
    return Estimate(
        weights=round(shard_parameters(checkpoint, parallel) * itemsize),
        activations=activation_bytes(architecture, parallel, shapes, itemsize),
        statistics=round(_awq_statistics(scheme) / tensor / pipeline),
        disk=round(
            logits + checkpoint.weight_bytes + (parameters * itemsize if rewrites_weights else 0)
        ),
        flops=2.0 * parameters * tokens,
    )


def _awq_statistics(scheme: Scheme) -> int:
    """Bytes of the second moments of the layers' inputs: AWQ keeps them until its search."""
    if scheme.method != "awq_lite":
        return 0
    return sum(
        4 * layer.in_features**2
        for name, layer in scheme.layers.items()
        if scheme.choices[name].recipe == scheme.recipe.name
    )
