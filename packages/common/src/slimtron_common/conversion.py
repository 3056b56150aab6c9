"""Write a checkpoint as another kind or in another type, and prove it the same model."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from slimtron_common.atomic import check_writable
from slimtron_common.checkpoint import Checkpoint, open_checkpoint, parse_spec
from slimtron_common.checkpoint.kinds import WRITERS
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.errors import ConfigError, ParallelismError, VerificationError
from slimtron_common.memory import check_memory, shard_parameters
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import (
    ParallelConfig,
    ParallelContext,
    forward_only,
    initialize_parallel,
)
from slimtron_common.parallel.context import (
    Device,
    check_world_size,
    resolve_device,
    world_size_from_environment,
)
from slimtron_common.progress import stage

__all__ = ["Conversion", "ConversionPlan", "convert", "plan_conversion"]

_NUM_SEQUENCES = 2
_SEQ_LENGTH = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """A conversion that may start: every check has passed and no weight was read."""

    source: Checkpoint
    kind: str
    """What to write: ``hf``, ``megatron`` or ``nemo2``."""

    path: Path
    dtype: torch.dtype
    """Type of the weights to write."""

    device: Device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was written, and how far its logits are from the original's."""

    path: Path
    dtype: torch.dtype
    num_parameters: int
    weight_bytes: int
    largest_logit: float
    """Largest absolute logit of the original, to judge the differences by."""

    difference: float
    """Largest difference between the logits of the files, read back, and of the model that was
    written."""

    rounding: float
    """Largest difference that rounding the weights makes to the logits; 0 where the written type
    holds the source's numbers."""


def plan_conversion(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    parallel: ParallelConfig | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    world_size: int | None = None,
) -> ConversionPlan:
    """Checks a conversion, reading headers only.

    Args:
        source: ``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``.
        target: ``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR`` to write.
        dtype: torch's name of the type to write; the source's without it.
        parallel: How the model is cut while it is converted.
        device: Where the logits are compared.
        overwrite: Whether an existing directory is replaced.
        world_size: Processes that there will be; those that were started without it.

    Raises:
        SlimtronError: What is wrong and what to do, with exit code 2.
    """
    parallel = parallel or ParallelConfig()
    check_world_size(parallel, world_size or world_size_from_environment())
    _check_context_parallel(parallel.context_parallel_size)
    kind, path = parse_spec(target, where="DST")
    checkpoint = open_checkpoint(source, where="SRC")
    checkpoint.check_unquantized("SRC", loss="a conversion would lose")
    written = checkpoint.compute_dtype(dtype, "") if dtype else checkpoint.dtype
    if kind == checkpoint.kind and written == checkpoint.dtype:
        raise ConfigError(
            "source and target are of one kind and type: there is nothing to convert",
            where="DST",
            found=target,
            hint="copy the directory, or ask for another type with --dtype",
        )
    if checkpoint.path.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            "the target would replace the model that it is made of", where="DST", found=target
        )
    checkpoint.architecture.check_parallel(
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel_size=parallel.expert_parallel_size,
    )
    check_writable(
        path, overwrite=overwrite, required_bytes=checkpoint.num_parameters * written.itemsize
    )
    plan = ConversionPlan(
        source=checkpoint,
        kind=kind,
        path=path,
        dtype=written,
        device=resolve_device(device),
        parallel=parallel,
        overwrite=overwrite,
    )
    _check_memory(plan)
    return plan


def convert(plan: ConversionPlan) -> Conversion:
    """Writes the checkpoint, reads it back and compares the logits of a few dozen tokens.

    All processes call it. The directory appears only when the comparison has passed.

    Raises:
        CheckpointError: The source cannot be read or the target cannot be written.
        VerificationError: What was read back computes something else. Nothing was written.
    """
    source = plan.source
    with initialize_parallel(plan.parallel, device=plan.device) as context:
        rounding = _rounding(plan, context)
        gc.collect()
        model = _load(source, context, plan.dtype)
        expected = _logits(model, source, context)
        largest = _largest(expected, context)
        with collective_directory(plan.path, context, overwrite=plan.overwrite) as directory:
            with stage(f"write {plan.kind}:{plan.path}"):
                _write(plan, model, directory, context)
            with stage("read it back"):
                written = open_checkpoint(f"{plan.kind}:{directory}")
                with torch.no_grad():
                    for parameter in model.parameters():
                        # What the files do not set must not pass for the right value.
                        parameter.fill_(torch.nan)
                written.load(model, context)
            found = _logits(model, source, context)
            difference = _largest(found - expected, context)
            _check(plan, largest, difference)
            size = written.weight_bytes
        return Conversion(
            path=plan.path,
            dtype=plan.dtype,
            num_parameters=source.num_parameters,
            weight_bytes=size,
            largest_logit=largest,
            difference=difference,
            rounding=rounding,
        )


def _check_context_parallel(size: int) -> None:
    if size > 1:
        raise ParallelismError(
            "a conversion has no sequences to cut over processes",
            where="parallel.context_parallel_size",
            found=size,
            allowed=1,
        )


def _check_memory(plan: ConversionPlan) -> None:
    parameters = shard_parameters(plan.source, plan.parallel)
    original = parameters * plan.source.dtype.itemsize if _rounds(plan) else 0
    written = parameters * plan.dtype.itemsize
    # Megatron-Core's writers get a copy of every process's part. Into Hugging Face's files goes one
    # tensor after the other, none larger than the embedding.
    copy = written
    if plan.kind == "hf":
        architecture = plan.source.architecture
        copy = architecture.vocab_size * architecture.hidden_size * plan.dtype.itemsize
    files = "what is being written"
    if plan.device == "cuda":
        check_memory(
            {"weights": max(original, written)}, "cuda", hint="raise --tp or --pp, or --device cpu"
        )
        steps = [{files: copy}]
    else:
        # The model in the source's type is gone when the one to be written loads.
        steps = [{"weights": original}, {"weights": written, files: copy}]
    for parts in steps:
        check_memory(parts, "cpu", hint="free memory, or raise --tp or --pp over more hosts")


def _rounds(plan: ConversionPlan) -> bool:
    """Whether the written type does not hold every number of the source's."""
    return torch.promote_types(plan.source.dtype, plan.dtype) != plan.dtype


@torch.no_grad()
def _rounding(plan: ConversionPlan, context: ParallelContext) -> float:
    source = plan.source
    if not _rounds(plan):
        return 0.0
    # In the source's arithmetic, so that it is the weights' rounding alone.
    model = _load(source, context, source.dtype)
    original = _logits(model, source, context)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(plan.dtype))
    return _largest(_logits(model, source, context) - original, context)


def _load(checkpoint: Checkpoint, context: ParallelContext, dtype: torch.dtype) -> nn.Module:
    with stage(f"load {checkpoint.kind}:{checkpoint.path} as {dtype}".replace("torch.", "")):
        model = build_model(checkpoint.architecture, context, dtype=dtype)
        checkpoint.load(model, context)
    return model


def _write(
    plan: ConversionPlan, model: nn.Module, directory: Path, context: ParallelContext
) -> None:
    companions = plan.source.companion_files()
    WRITERS[plan.kind](directory, model, plan.source.architecture, context, companions=companions)


def _logits(model: nn.Module, checkpoint: Checkpoint, context: ParallelContext) -> torch.Tensor:
    """This process's logits of random tokens, float32; a single zero before the last stage."""
    architecture = checkpoint.architecture
    length = min(_SEQ_LENGTH, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(architecture.vocab_size, (_NUM_SEQUENCES, length), generator=generator)
    seen = [torch.zeros(1, device=context.device)]
    forward_only(model, [tokens], context, lambda _, logits: seen.append(logits.float().clone()))
    return seen[-1]


def _largest(values: torch.Tensor, context: ParallelContext) -> float:
    """Largest absolute value over all processes; infinite if there is a NaN."""
    largest = values.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()[None]
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def _check(plan: ConversionPlan, largest: float, difference: float) -> None:
    if largest == torch.inf:
        raise VerificationError(
            "the model's logits are not finite, so the files cannot be compared with it",
            where=plan.path,
            found=f"computed in {plan.dtype}".replace("torch.", ""),
            hint="bfloat16 reaches as far as float32, float16 only to 65504"
            if plan.dtype == torch.float16
            else "the weights of the source are damaged, or it was not trained",
        )
    # The same weights in the same layout: at most the last bit of the largest logit.
    tolerance = torch.finfo(plan.dtype).eps * largest
    if not difference <= tolerance:
        raise VerificationError(
            "the files, read back, compute other logits than the model that was written",
            where=plan.path,
            found=f"a difference of {difference:.3g} among logits up to {largest:.3g}",
            allowed=f"{tolerance:.3g}",
            hint="nothing was kept; check the disk, and report it if it happens again",
        )
