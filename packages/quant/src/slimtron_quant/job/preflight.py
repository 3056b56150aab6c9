"""Everything that can be refused before the weights load, and what the job will cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from slimtron_common.evaluation.reference import comparison_bytes, reference_bytes
from slimtron_common.layerwise import hidden_state_bytes
from slimtron_common.manifest import environment_versions
from slimtron_common.memory import (
    activation_bytes,
    check_memory,
    layer_parameters,
    required_memory,
    shard_parameters,
)
from slimtron_common.models import Architecture
from slimtron_common.models.hybrid import refuse_hybrid
from slimtron_common.parallel.context import (
    check_world_size,
    resolve_device,
    world_size_from_environment,
)
from slimtron_common.parallel.context_parallel import check_sequence_cut
from slimtron_common.workdir import check_resumable
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.formats.kv_cache import KV_CACHE_FORMATS, describe_kv_cache
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.job.layerwise import check_layerwise
from slimtron_quant.job.mixed import Candidates, MixedPlan, open_candidates, plan_mixed
from slimtron_quant.nemo import check_nemo_opens_quantizers
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
    """What becomes of each layer; in a mixed-precision job, by its first candidate alone."""

    mixed: MixedPlan | None
    """The choice of a mixed-precision job."""

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

    @property
    def kv_cache(self) -> str:
        """What becomes of the KV cache, and what a token of it takes."""
        kv_cache = self.scheme.kv_cache
        dtype: torch.dtype = getattr(torch, self.config.export.torch_dtype)
        return describe_kv_cache(
            KV_CACHE_FORMATS[kv_cache.qformat] if kv_cache else None,
            self.checkpoint.architecture,
            dtype.itemsize,
        )

    @property
    def memory(self) -> str:
        """What a process needs, and for which part of the model."""
        needed = f"about {self.estimate.memory / 2**30:.2f} GiB a process beside the libraries"
        return f"{needed}, one layer at a time" if self.config.layerwise else needed

    @property
    def goal(self) -> str:
        """What the model is quantized to, in a few words."""
        parts = []
        if self.mixed is not None:
            parts.append(self.config.mixed.budget)
        elif self.config.quantization.algorithm is not None:
            parts.append(self.recipe.name)
        if self.scheme.kv_cache:
            parts.append(f"a KV cache in {self.scheme.kv_cache.qformat}")
        return " with ".join(parts)

    @property
    def method(self) -> str:
        """How, in a line."""
        if self.mixed is None:
            return f"{self.recipe.name}: {self.recipe.summary}"
        return f"for each layer one of {', '.join(self.config.mixed.candidates)}"


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
    checkpoint.check_unquantized("model", loss="quantizing again would replace")
    architecture, parallel = checkpoint.architecture, config.parallel
    refuse_hybrid(architecture, "model")
    architecture.check_parallel(
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel_size=parallel.expert_parallel_size,
    )
    candidates = None
    if config.mixed.is_on:
        if parallel.expert_parallel_size > 1 and config.mixed.sensitivity is None:
            raise ParallelismError(
                "sensitivity is measured where every process holds all experts",
                where="parallel.expert_parallel_size",
                found=parallel.expert_parallel_size,
                allowed="1, or any with a measured --sensitivity",
                hint="measure once over tensor and pipeline parallelism",
            )
        candidates = open_candidates(config, architecture, device)
        schemes = list(candidates.schemes.values())
    else:
        schemes = [_scheme(config, architecture, device)]
    if config.export.export_format == "nemo":
        check_nemo_opens_quantizers()
    if config.export.export_format != "hf" and schemes[0].kv_cache is not None:
        raise ConfigError(
            "the quantizers of a KV cache are not written to Megatron checkpoints",
            where="export.export_format",
            found=config.export.export_format,
            allowed="hf with a quantized KV cache",
            hint="--kv-cache none for training on; quantize the cache of what was trained",
        )
    if config.layerwise:
        check_layerwise(config, schemes)
    _check_lengths(config, architecture.max_position_embeddings)
    dtype = checkpoint.compute_dtype(config.dtype, device)
    estimate = _estimate(config, checkpoint, schemes, candidates, dtype)
    check_writable(
        config.output,
        # A resumed run replaces nothing: its output is not there, or is its own.
        overwrite=overwrite or resume,
        required_bytes=0 if resume else estimate.disk,
    )
    check_memory(
        estimate.parts,
        device,
        hint="raise tensor_parallel_size or, for experts, expert_parallel_size, or lower the batch "
        "sizes and sequence lengths"
        if config.layerwise
        else "hold one layer at a time with --layerwise, or raise tensor_parallel_size, "
        "pipeline_parallel_size or, for experts, expert_parallel_size, or lower the batch sizes "
        "and sequence lengths",
    )
    needs_text = candidates is not None or schemes[0].needs_calibration
    evaluation, calibration = _open_text(config, needs_text, checkpoint)
    data_parallel_size = world_size // parallel.model_parallel_size
    _check_sequences(
        evaluation, calibration, data_parallel_size, equal=parallel.expert_parallel_size > 1
    )
    mixed, scheme = None, schemes[0]
    if candidates is not None and calibration is not None:
        mixed = plan_mixed(
            candidates, checkpoint, calibration, data_parallel_size=data_parallel_size
        )
    identity = {
        "config": to_dict(config),
        # A recipe file, or ModelOpt, may say something else by the time of a resumption.
        "recipe": fingerprint(to_dict(scheme.modelopt_config())),
        "mixed": mixed.identity() if mixed else None,
        "model": checkpoint.identity,
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
        mixed=mixed,
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
        check_sequence_cut(length, config.parallel.context_parallel_size, where=where)


def _open_text(
    config: QuantJobConfig, needs_calibration: bool, checkpoint: Checkpoint
) -> tuple[TokenDataset, TokenDataset | None]:
    quantization, evaluation = config.quantization, config.evaluation
    calibration_source = (quantization.calibration_source, quantization.calibration_text_field)
    source = (
        calibration_source
        if evaluation.source is None
        else (evaluation.source, evaluation.text_field)
    )
    wanted = {source} | ({calibration_source} if needs_calibration else set())
    for name, text_field in sorted(wanted):
        check_source(name, text_field=text_field)
    tokenizer = checkpoint.tokenizer()
    held_out = _text(source, evaluation.num_tokens, evaluation.seq_length, config)
    if not needs_calibration:
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
    evaluation: TokenDataset,
    calibration: TokenDataset | None,
    data_parallel_size: int,
    *,
    equal: bool,
) -> None:
    for where, dataset in (
        ("evaluation.num_tokens", evaluation),
        ("quantization.calibration_dataset_size", calibration),
    ):
        if dataset is None:
            continue
        if equal:
            dataset.check_equal_shares(data_parallel_size, where=where)
        if dataset.num_sequences < data_parallel_size:
            raise ConfigError(
                "every data-parallel process needs a sequence",
                where=where,
                found=f"{dataset.num_sequences} sequences",
                allowed=f"{data_parallel_size} or more",
            )


def _estimate(
    config: QuantJobConfig,
    checkpoint: Checkpoint,
    schemes: Sequence[Scheme],
    candidates: Candidates | None,
    dtype: torch.dtype,
) -> Estimate:
    architecture, parallel = checkpoint.architecture, config.parallel
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    parameters, itemsize = checkpoint.num_parameters, dtype.itemsize
    evaluation, quantization = config.evaluation, config.quantization
    calibrates = candidates is not None or schemes[0].needs_calibration
    shapes = [(evaluation.micro_batch_size, evaluation.seq_length)]
    if calibrates:
        size = min(quantization.calibration_batch_size, quantization.calibration_dataset_size)
        shapes.append((size, quantization.calibration_seq_len))
    moe = architecture.moe
    # Experts that a token takes, and those that a calibration token takes.
    routes = moe.experts_per_token if moe else 0
    all_routes = moe.num_experts if moe and quantization.calibrate_all_experts else routes
    compared = comparison_bytes(
        evaluation.micro_batch_size * evaluation.seq_length, architecture.vocab_size, dtype
    )
    logits = reference_bytes(evaluation.num_tokens, architecture.vocab_size, dtype)
    rewrites_weights = any(scheme.recipe.rewrites_weights for scheme in schemes)
    statistics = max(
        _awq_statistics(scheme, parallel.expert_parallel_size, layerwise=config.layerwise)
        for scheme in schemes
    )
    experts = architecture.num_expert_parameters / moe.num_experts if moe else 0.0
    shared = parameters - architecture.num_expert_parameters
    routed = shared + routes * experts
    products = routed * 3 * evaluation.num_tokens
    calibration_tokens = quantization.calibration_dataset_size * quantization.calibration_seq_len
    if calibrates:
        products += (shared + all_routes * experts) * calibration_tokens
    if candidates is not None and config.mixed.sensitivity is None:
        measured = min(config.mixed.sensitivity_tokens, calibration_tokens)
        tokens = round(candidates.num_passes * measured) + len(schemes) * calibration_tokens
        products += routed * tokens
        statistics += pipeline * reference_bytes(measured, architecture.vocab_size, dtype)
    held, carried = shard_parameters(checkpoint, parallel), 0
    if config.layerwise:
        held = layer_parameters(checkpoint, parallel)
        tokens = max(evaluation.num_tokens, calibration_tokens if calibrates else 0)
        carried = hidden_state_bytes(tokens, architecture, dtype)
    return Estimate(
        weights=round(held * itemsize),
        activations=activation_bytes(
            architecture,
            parallel,
            shapes,
            itemsize,
            experts_per_token=all_routes if calibrates else routes,
        )
        + compared // tensor // parallel.context_parallel_size,
        statistics=round(statistics / tensor / pipeline),
        disk=round(
            logits
            + carried
            + checkpoint.weight_bytes
            + (parameters * itemsize if rewrites_weights else 0)
        ),
        flops=2.0 * products,
    )


def _awq_statistics(scheme: Scheme, expert_parallel_size: int, *, layerwise: bool) -> float:
    """Bytes of the second moments of the layers' inputs: AWQ keeps them until its search."""
    if scheme.method != "awq_lite":
        return 0
    sizes: Counter[int] = Counter()
    for name, layer in scheme.layers.items():
        if scheme.choices[name].recipe == scheme.recipe.name:
            parts = 1 if layer.expert is None else expert_parallel_size
            sizes[layer.layer] += 4 * layer.in_features**2 // parts
    return max(sizes.values(), default=0) if layerwise else sizes.total()
