"""Prune a Megatron model in memory: the contract of NeMo 2's ``prune_language_model``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.huggingface import save_huggingface
from slimtron_common.checkpoint.megatron import save_megatron
from slimtron_common.data import TokenDataset
from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import architecture_of
from slimtron_common.parallel import ParallelContext, unwrap_model
from slimtron_prune.config import PruningConfig
from slimtron_prune.rebuild import check_stages, shrink_model
from slimtron_prune.scoring.collect import check_layout, collect_scores
from slimtron_prune.selection import select, select_layers
from slimtron_prune.targets import target_architecture

__all__ = ["prune_language_model", "save_pruned_model"]


def prune_language_model(
    model: Any,
    pruning_config: PruningConfig,
    data_module: TokenDataset | Sequence[Tensor] | None = None,
    trainer: Any = None,
) -> Any:
    """Prunes a model in place, its config included.

    Takes the place of ``nemo.collections.llm.modelopt.prune_language_model``, at any tensor,
    pipeline and data parallelism. Runs on GPUs and, inside
    ``slimtron_common.backend.cpu_backend()``, on the CPU; Megatron's model-parallel groups must
    exist (``slimtron_common.initialize_parallel`` or a trainer sets them up). All processes call
    it.

    Args:
        model: A Megatron-Core model or what holds it. Optimizers that hold its parameters have
            to be made again.
        pruning_config: What to prune to.
        data_module: The text that decides what goes: a ``TokenDataset``, or this data-parallel
            rank's token ids, each ``[b, s]``. Not needed for ``drop_layers``.
        trainer: Not needed for a Megatron-Core model; kept for NeMo's signature.

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
        batches = _batches(data_module, context)
        training = megatron.training
        megatron.eval()
        try:
            scores = collect_scores(megatron, batches, source, context)
        finally:
            megatron.train(training)
        selection = select(target, scores)
    check_stages(megatron, selection, context)
    shrink_model(megatron, selection, context)
    return model


def save_pruned_model(
    model: Any,
    save_path: str | Path,
    *,
    model_dir: str | Path | None = None,
    export_format: Literal["hf", "megatron"] = "megatron",
    overwrite: bool = False,
) -> None:
    """Saves a pruned model so that it opens without an edit.

    All processes call it; the directory appears whole or not at all.

    Args:
        model: What ``prune_language_model`` returned. NeMo's function takes the trainer.
        save_path: The directory to write.
        model_dir: The Hugging Face directory of the original, whose tokenizer and token ids go
            along; without it there are none.
        export_format: ``megatron``, a distributed checkpoint, or ``hf``.
        overwrite: Whether an existing output of Slimtron is replaced.

    Raises:
        CheckpointError: The directory exists or cannot be written.
        ConfigError: The format is unknown, or the original is of another family.
    """
    writers = {"hf": save_huggingface, "megatron": save_megatron}
    if export_format not in writers:
        raise ConfigError(
            "is no format",
            where="export_format",
            found=export_format,
            allowed=", ".join(writers),
        )
    megatron: Any = unwrap_model(model)
    architecture, companions = architecture_of(megatron), []
    if model_dir is not None:
        original = open_checkpoint(f"hf:{model_dir}", where="model_dir")
        architecture = _as_original(architecture, original.architecture)
        companions = original.companion_files()
    context = ParallelContext.from_megatron(
        device=next(megatron.parameters()).device,
        sequence_parallel=megatron.config.sequence_parallel,
    )
    writers[export_format](
        Path(save_path),
        megatron,
        architecture,
        context,
        companions=companions,
        overwrite=overwrite,
    )


def _batches(
    data: TokenDataset | Sequence[Tensor] | None, context: ParallelContext
) -> Sequence[Tensor]:
    """This process's token ids; what holds them is only read."""
    if data is None:
        raise ConfigError(
            "what is important is found on a text",
            where="data_module",
            found=None,
            hint="pass a TokenDataset or token batches; only drop_layers needs none",
        )
    batches = (
        data.batches(1, context.dp_rank, context.dp_size)
        if isinstance(data, TokenDataset)
        else list(data)
    )
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
