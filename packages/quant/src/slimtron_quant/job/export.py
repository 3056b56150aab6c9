"""From a quantized checkpoint of Megatron or NeMo to the directory that inference engines load."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass

import torch

from slimtron_common.atomic import check_writable
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.config import to_dict
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.measure import EvaluationPlan, plan_evaluation
from slimtron_common.evaluation.reference import reference_bytes
from slimtron_common.manifest import write_manifest
from slimtron_common.memory import check_memory, shard_parameters
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.parallel.context import Device
from slimtron_common.progress import stage
from slimtron_common.report import Column, Comparison, Number, write_report
from slimtron_quant.config import ExportConfig
from slimtron_quant.export.kinds import Export, open_export, write_export
from slimtron_quant.export.megatron import check_is_quantized
from slimtron_quant.export.verify import check_agreement

__all__ = ["ExportPlan", "export", "plan_export"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """An export that may start: every check has passed and no weight was read."""

    evaluation: EvaluationPlan
    """The checkpoint, and how the export is compared with it."""

    config: ExportConfig
    overwrite: bool = False


def plan_export(
    model: str,
    config: ExportConfig,
    evaluation: EvaluationConfig,
    *,
    parallel: ParallelConfig | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    world_size: int | None = None,
) -> ExportPlan:
    """Checks an export, reading headers and text but no weights.

    Args:
        model: ``megatron:DIR`` or ``nemo2:DIR``, a quantized checkpoint.
        config: Where to write, and the type of what is not quantized.
        evaluation: The text that both are compared on.
        parallel: How the model is cut meanwhile.
        device: Where to compute.
        overwrite: Whether an existing directory is replaced.
        world_size: Processes that there will be; those that were started without it.

    Raises:
        SlimtronError: What is wrong and what to do, with exit code 2.
    """
    plan = plan_evaluation(
        model, evaluation, parallel=parallel, device=device, world_size=world_size
    )
    checkpoint = plan.model
    check_is_quantized(checkpoint)
    dtype = checkpoint.compute_dtype(plan.dtype, plan.device)
    logits = reference_bytes(evaluation.num_tokens, checkpoint.architecture.vocab_size, dtype)
    check_writable(
        config.path, overwrite=overwrite, required_bytes=checkpoint.weight_bytes + logits
    )
    weights = shard_parameters(checkpoint, plan.parallel) * dtype.itemsize
    check_memory({"weights": weights}, plan.device, hint="raise --tp or --pp")
    return ExportPlan(evaluation=plan, config=config, overwrite=overwrite)


def export(plan: ExportPlan) -> Comparison:
    """Writes the directory, reads it back and compares it with the checkpoint.

    All processes call it. The directory appears only when the comparison has passed.

    Returns:
        The checkpoint and the export, measured; the same on every process.

    Raises:
        CheckpointError: The checkpoint cannot be read or the directory cannot be written.
        UnsupportedModelError: A layer's quantizers have no format on disk.
        VerificationError: The export, reloaded, is not the model that was written.
    """
    source, path = plan.evaluation.model, plan.config.path
    config, dataset = plan.evaluation.config, plan.evaluation.dataset
    vocab_size = source.architecture.vocab_size
    dtype = source.compute_dtype(plan.evaluation.dtype, plan.evaluation.device)
    with (
        initialize_parallel(plan.evaluation.parallel, device=plan.evaluation.device) as context,
        collective_directory(path, context, overwrite=plan.overwrite) as directory,
    ):
        batches = dataset.batches(config.micro_batch_size, context.dp_rank, context.dp_size)
        with stage(f"load {source.kind}:{source.path}"):
            model = build_model(source.architecture, context, dtype=dtype)
            source.load(model, context)
        with stage("export"):
            write_export(
                plan.config.export_format,
                directory,
                model,
                source.architecture,
                context,
                dtype=getattr(torch, plan.config.torch_dtype),
                companions=source.companion_files(),
            )
        recorded = directory / "logits"
        if context.is_main:
            recorded.mkdir()
        context.barrier()
        with stage("evaluate what was written"):
            memory = evaluate(model, batches, context, vocab_size=vocab_size, record=recorded)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        with stage("reload and evaluate"):
            exported = open_export(directory)
            found = evaluate(
                exported.build(context, dtype=dtype),
                batches,
                context,
                vocab_size=vocab_size,
                references={"memory": recorded},
            )
        check_agreement(memory, found, where=path)
        comparison = _comparison(plan, memory, found, exported)
        context.barrier()
        if context.is_main:
            shutil.rmtree(recorded)
            write_report(directory, comparison)
            write_manifest(
                directory,
                kind="quantized",
                config={"model": f"{source.kind}:{source.path}", "export": to_dict(plan.config)},
                metrics=comparison.columns[-1].metrics,
                seed=None,
            )
    return comparison


def _comparison(
    plan: ExportPlan, memory: Evaluation, found: Evaluation, exported: Export
) -> Comparison:
    source, evaluation = plan.evaluation.model, plan.evaluation
    distance = found.distances["memory"]
    return Comparison(
        title=f"{source.path.name}, exported",
        columns=(
            _column("checkpoint", memory, source.weight_bytes, source.num_parameters),
            _column(
                "exported",
                found,
                exported.weight_bytes,
                source.num_parameters,
                kl=distance.kl,
                agreement=distance.agreement,
            ),
        ),
        facts={
            "Model": f"{source.kind}:{source.path}",
            "Formats": exported.describe(),
            "Evaluated on": f"{evaluation.config.source}: {evaluation.dataset.num_sequences} "
            f"sequences of {evaluation.dataset.seq_length} tokens",
        },
    )


def _column(
    name: str, found: Evaluation, weight_bytes: int, num_parameters: int, **more: Number
) -> Column:
    metrics: dict[str, Number] = {
        "weight_bytes": weight_bytes,
        "bits_per_weight": weight_bytes * 8 / num_parameters,
        "perplexity": found.perplexity,
        "num_tokens": found.num_tokens,
    }
    return Column(name, {**metrics, **more})
