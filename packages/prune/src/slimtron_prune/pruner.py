"""Prune a Megatron model in memory: the contract of NeMo 2's ``prune_language_model``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.kinds import KIND_OF_FORMAT, WRITERS
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.data import TokenDataset
from slimtron_common.errors import ConfigError
from slimtron_common.integrations.nemo import describe_with_nemo, is_trainer
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import architecture_of
from slimtron_common.parallel import ParallelContext, unwrap_model
from slimtron_prune.config import PruningConfig
from slimtron_prune.nemo import is_data_module, record_sizes, token_batches
from slimtron_prune.rebuild import check_stages, shrink_model
from slimtron_prune.scoring.collect import check_layout, collect_scores
from slimtron_prune.selection import select, select_layers
from slimtron_prune.targets import target_architecture

__all__ = ["prune_language_model", "save_pruned_model"]


def prune_language_model(
    model: Any,
    pruning_config: PruningConfig,
    data_module: Any = None,
    trainer: Any = None,
) -> Any:
    """Prunes a model in place, its config included.

    Takes the place of ``nemo.collections.llm.modelopt.prune_language_model``, at any tensor,
    pipeline and data parallelism. Runs on GPUs and, inside
    ``slimtron_common.backend.cpu_backend()``, on the CPU; Megatron's model-parallel groups must
    exist (``slimtron_common.initialize_parallel`` or a trainer sets them up). All processes call
    it.

    Args:
        model: A Megatron-Core model or what holds it: NeMo's ``llm.GPTModel``, its
            ``MegatronParallel``. Optimizers that hold its parameters have to be made again.
        pruning_config: What to prune to.
        data_module: The text that decides what goes: NeMo's data module, whose training part is
            read and which stays as it was, a ``TokenDataset``, or this data-parallel rank's token
            ids, each ``[b, s]``. Not needed for ``drop_layers``.
        trainer: NeMo's; with a data module of NeMo's its ``limit_val_batches`` global batches are
            read. Not needed otherwise.

    Returns:
        ``model``, smaller.

    Raises:
        ConfigError: The targets do not fit the model, or text is missing. As for all errors,
            the model is untouched.
        ParallelismError: The model is laid out in a way that cannot be scored, or the smaller
            one could not be laid out so.
        UnsupportedModelError: No Megatron-Core model of a supported family is inside.
    """
    megatron: Any = unwrap_model(model)
    context = ParallelContext.from_megatron(
        device=next(megatron.parameters()).device,
        sequence_parallel=megatron.config.sequence_parallel,
    )
    source = architecture_of(megatron)
    target = target_architecture(source, pruning_config)
    target.check_parallel(tensor_parallel_size=context.tp_size, pipeline_parallel_size=1)
    if pruning_config.drop_layers is not None:
        selection = select_layers(source, target, set(pruning_config.drop_layers))
    else:
        check_layout(
            source,
            tensor_parallel_size=context.tp_size,
            context_parallel_size=context.cp_size,
        )
        batches = _batches(data_module, trainer, context)
        training = megatron.training
        megatron.eval()
        try:
            scores = collect_scores(megatron, batches, source, context)
        finally:
            megatron.train(training)
        selection = select(target, scores)
    check_stages(megatron, selection, context)
    shrink_model(megatron, selection, context)
    record_sizes(model, megatron.config)
    return model


def save_pruned_model(
    model: Any,
    save_path: str | Path,
    *,
    model_dir: str | Path | None = None,
    export_format: Literal["hf", "megatron", "nemo"] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a pruned model so that it opens without an edit.

    All processes call it; the directory appears whole or not at all.

    Args:
        model: NeMo's trainer, whose model was pruned, or what ``prune_language_model`` returned.
        save_path: The directory to write.
        model_dir: The Hugging Face directory of the original, whose tokenizer and token ids go
            along; without it there are none, but for a trainer's in ``nemo``.
        export_format: ``hf``, ``megatron``, a distributed checkpoint, or ``nemo``, a NeMo 2
            checkpoint; without it ``nemo`` for a trainer, ``megatron`` otherwise.
        overwrite: Whether an existing output of Slimtron is replaced.

    Raises:
        CheckpointError: The directory exists or cannot be written.
        ConfigError: The format is unknown, or the original is of another family.
    """
    trainer = model if is_trainer(model) else None
    written = export_format or ("nemo" if trainer else "megatron")
    if written not in KIND_OF_FORMAT:
        raise ConfigError(
            "is no format",
            where="export_format",
            found=written,
            allowed=", ".join(KIND_OF_FORMAT),
        )
    megatron: Any = unwrap_model(trainer.model if trainer else model)
    architecture, companions = architecture_of(megatron), []
    if model_dir is not None:
        original = open_checkpoint(f"hf:{model_dir}", where="model_dir")
        architecture = _as_original(architecture, original.architecture)
        companions = original.companion_files()
    context = ParallelContext.from_megatron(
        device=next(megatron.parameters()).device,
        sequence_parallel=megatron.config.sequence_parallel,
    )
    more = {}
    if trainer and written == "nemo":
        more["describe"] = describe_with_nemo(trainer)
    write = WRITERS[KIND_OF_FORMAT[written]]
    with collective_directory(Path(save_path), context, overwrite=overwrite) as directory:
        write(directory, megatron, architecture, context, companions=companions, **more)


def _batches(data: Any, trainer: Any, context: ParallelContext) -> Sequence[Tensor]:
    """This process's token ids; what holds them is only read."""
    if data is None:
        raise ConfigError(
            "what is important is found on a text",
            where="data_module",
            found=None,
            hint="pass NeMo's data module, a TokenDataset or token batches; only drop_layers needs "
            "none",
        )
    if isinstance(data, TokenDataset):
        batches = data.batches(1, context.dp_rank, context.dp_size)
    elif is_data_module(data):
        batches = token_batches(data, trainer, context)
    else:
        batches = list(data)
    wrong = [
        b for b in batches if not isinstance(b, Tensor) or b.dim() != 2 or b.is_floating_point()
    ]
    if wrong or not batches:
        raise ConfigError(
            "holds no batches of token ids",
            where="data_module",
            found=f"{type(wrong[0]).__name__}" if wrong else "nothing",
            allowed="tensors [b, s] of integers",
        )
    return batches


def _as_original(pruned: Architecture, original: Architecture) -> Architecture:
    """The original's family and ids with the pruned model's sizes."""
    fixed = ("head_dim", "vocab_size", "activation", "normalization", "qkv_bias", "qk_norm")
    wrong = [name for name in fixed if getattr(pruned, name) != getattr(original, name)]
    if wrong:
        raise ConfigError(
            "is not the original of this model",
            where="model_dir",
            found=", ".join(f"{name} {getattr(original, name)}" for name in wrong),
            allowed=", ".join(f"{name} {getattr(pruned, name)}" for name in wrong),
        )
    return replace(
        original,
        num_layers=pruned.num_layers,
        hidden_size=pruned.hidden_size,
        ffn_hidden_size=pruned.ffn_hidden_size,
        num_attention_heads=pruned.num_attention_heads,
        num_query_groups=pruned.num_query_groups,
        moe=pruned.moe,
        hybrid=pruned.hybrid,
    )
