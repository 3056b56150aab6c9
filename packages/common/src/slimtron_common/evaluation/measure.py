"""Measure a checkpoint on text, alone or against another one."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.data import DataConfig, TokenDataset, check_source, token_dataset
from slimtron_common.errors import CheckpointError, ConfigError, UnsupportedModelError
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.evaluate import Evaluation, evaluate
from slimtron_common.evaluation.reference import reference_bytes
from slimtron_common.manifest import environment_versions
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, ParallelContext, initialize_parallel
from slimtron_common.parallel.context import (
    Device,
    check_world_size,
    resolve_device,
    world_size_from_environment,
)
from slimtron_common.parallel.context_parallel import check_sequence_cut
from slimtron_common.progress import stage
from slimtron_common.report import Column, Comparison, Number

__all__ = ["EvaluationPlan", "measure", "plan_evaluation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlan:
    """An evaluation that may start: every check has passed and no weight was read."""

    model: Checkpoint
    reference: Checkpoint | None
    config: EvaluationConfig
    dataset: TokenDataset
    parallel: ParallelConfig
    world_size: int
    device: Device
    dtype: str
    """torch's name of the type to compute in, or ``auto`` as in ``Checkpoint.compute_dtype``."""

    seed: int


def plan_evaluation(
    model: str,
    config: EvaluationConfig,
    *,
    against: str | None = None,
    parallel: ParallelConfig | None = None,
    device: Device = "auto",
    dtype: str = "auto",
    seed: int = 1234,
    trust_remote_code: bool = False,
    world_size: int | None = None,
) -> EvaluationPlan:
    """Checks an evaluation, reading headers and text but no weights.

    Args:
        model: ``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``.
        config: The text.
        against: The same for the model to measure the distance from.
        parallel: How both models are cut.
        device: Where to compute.
        dtype: torch's name of the type to compute in, or ``auto``.
        seed: Seeds the order of the text.
        trust_remote_code: Whether the tokenizers may run code that comes with the models.
        world_size: Processes that there will be; those that were started without it.

    Raises:
        SlimtronError: What is wrong and what to do, with exit code 2.
    """
    parallel = parallel or ParallelConfig()
    world_size = world_size or world_size_from_environment()
    check_world_size(parallel, world_size)
    check_sequence_cut(config.seq_length, parallel.context_parallel_size, where="seq_length")
    device = resolve_device(device)
    if config.source is None:
        raise ConfigError("an evaluation needs text", where="source", found=None)
    check_source(config.source, text_field=config.text_field)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    _check_fit(checkpoint, config, parallel)
    data = DataConfig(
        source=config.source,
        num_tokens=config.num_tokens,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        seed=seed,
        text_field=config.text_field,
    )
    reference = None
    if against is not None:
        reference = open_checkpoint(against, where="against", trust_remote_code=trust_remote_code)
        _check_fit(reference, config, parallel)
        _check_space(reference, config, device, dtype)
    dataset = token_dataset(data, checkpoint.tokenizer())
    if parallel.expert_parallel_size > 1:
        replicas = world_size // parallel.model_parallel_size
        dataset.check_equal_shares(replicas, where="num_tokens")
    if reference is not None:
        _check_same_tokens(checkpoint, reference, data, dataset)
    return EvaluationPlan(
        model=checkpoint,
        reference=reference,
        config=config,
        dataset=dataset,
        parallel=parallel,
        world_size=world_size,
        device=device,
        dtype=dtype,
        seed=seed,
    )


def measure(plan: EvaluationPlan) -> Comparison:
    """Evaluates the model, after the reference if there is one; one is in memory at a time.

    All processes call it.

    Returns:
        The same on every process: the columns ``reference``, if there is one, and ``model``.
    """
    columns = []
    with (
        initialize_parallel(plan.parallel, device=plan.device, seed=plan.seed) as context,
        tempfile.TemporaryDirectory(prefix="slimtron-logits-") as folder,
    ):
        references = {}
        if plan.reference is not None:
            recording = Path(folder)
            found = _evaluate(plan, plan.reference, context, record=recording)
            column = _column("reference", plan.reference, found)
            column.metrics.update(kl=0.0, agreement=1.0)
            columns.append(column)
            references["reference"] = recording
        found = _evaluate(plan, plan.model, context, references)
        columns.append(_column("model", plan.model, found))
    title = _spec(plan.model)
    if plan.reference is not None:
        title += f" against {_spec(plan.reference)}"
    return Comparison(title=title, columns=tuple(columns), facts=_facts(plan))


def _check_fit(checkpoint: Checkpoint, config: EvaluationConfig, parallel: ParallelConfig) -> None:
    architecture = checkpoint.architecture
    architecture.check_parallel(
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel_size=parallel.expert_parallel_size,
    )
    if config.seq_length > architecture.max_position_embeddings:
        raise ConfigError(
            "sequences are longer than the model's positions",
            where="seq_length",
            found=config.seq_length,
            allowed=f"at most {architecture.max_position_embeddings} for {checkpoint.path}",
        )


def _check_space(reference: Checkpoint, config: EvaluationConfig, device: str, dtype: str) -> None:
    computed = reference.compute_dtype(dtype, device)
    needed = reference_bytes(config.num_tokens, reference.architecture.vocab_size, computed)
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            "the disk has too little space for the reference's logits",
            where=folder,
            found=f"{free / 2**30:.2f} GiB free",
            allowed=f"{needed / 2**30:.2f} GiB or more",
            hint="name a larger disk in TMPDIR, or evaluate on fewer tokens",
        )


def _check_same_tokens(
    model: Checkpoint, reference: Checkpoint, data: DataConfig, dataset: TokenDataset
) -> None:
    sizes = model.architecture.vocab_size, reference.architecture.vocab_size
    same = sizes[0] == sizes[1]
    # Logits of one text can only be compared token by token.
    if not same or token_dataset(data, reference.tokenizer()).fingerprint != dataset.fingerprint:
        raise UnsupportedModelError(
            "the two models have different tokens, so their predictions cannot be compared",
            where="against",
            found="tokenizers that cut the text differently"
            if same
            else f"vocabularies of {sizes[0]} and {sizes[1]} tokens",
            hint="evaluate each of them alone",
        )


def _evaluate(
    plan: EvaluationPlan,
    checkpoint: Checkpoint,
    context: ParallelContext,
    references: Mapping[str, Path] = MappingProxyType({}),
    record: Path | None = None,
) -> Evaluation:
    # Before the weights: there may be too few sequences for the processes.
    batches = plan.dataset.batches(plan.config.micro_batch_size, context.dp_rank, context.dp_size)
    # What the model before this one left.
    gc.collect()
    torch.cuda.empty_cache()
    architecture = checkpoint.architecture
    with stage(f"load {_spec(checkpoint)}"):
        dtype = checkpoint.compute_dtype(plan.dtype, context.device.type)
        model = build_model(architecture, context, dtype=dtype)
        checkpoint.load(model, context)
    return evaluate(
        model,
        batches,
        context,
        vocab_size=architecture.vocab_size,
        references=references,
        record=record,
        description=f"evaluate {_spec(checkpoint)}",
    )


def _column(name: str, checkpoint: Checkpoint, found: Evaluation) -> Column:
    metrics: dict[str, Number] = {
        "weight_bytes": checkpoint.weight_bytes,
        "num_parameters": checkpoint.num_parameters,
        "bits_per_weight": checkpoint.weight_bytes * 8 / checkpoint.num_parameters,
        "perplexity": found.perplexity,
        "loss": found.loss,
        "num_tokens": found.num_tokens,
    }
    for distance in found.distances.values():
        metrics.update(kl=distance.kl, agreement=distance.agreement)
    return Column(name, metrics)


def _facts(plan: EvaluationPlan) -> dict[str, str]:
    dataset, parallel = plan.dataset, plan.parallel
    dtype = plan.model.compute_dtype(plan.dtype, plan.device)
    facts = {"Model": _spec(plan.model)}
    if plan.reference is not None:
        facts["Reference"] = _spec(plan.reference)
    return {
        **facts,
        "Evaluated on": f"{plan.config.source}: {dataset.num_sequences} sequences of "
        f"{dataset.seq_length} tokens (SHA-256 {dataset.fingerprint[:12]})",
        "Computed in": f"{dtype} on {plan.device}".replace("torch.", ""),
        "Layout": parallel.describe(plan.world_size),
        "Seed": str(plan.seed),
        "Versions": ", ".join(f"{k} {v}" for k, v in environment_versions().items()),
    }


def _spec(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.kind}:{checkpoint.path}"
