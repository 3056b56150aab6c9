"""The arguments that ``run`` and ``plan`` share, and the config that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slimtron_common.job_arguments import (
    Flag,
    add_config,
    add_flags,
    add_sequence_parallel,
    add_set,
    config_flags,
)

if TYPE_CHECKING:
    from slimtron_distill.job.config import DistillJobConfig

__all__ = ["add_job_arguments", "job_config"]

_FLAGS: tuple[tuple[str, tuple[Flag, ...]], ...] = (
    (
        "what",
        (
            ("--student", "student", str, "KIND:DIR", "hf:DIR, megatron:DIR or nemo2:DIR"),
            ("--teacher", "teacher", str, "KIND:DIR", "hf:DIR, megatron:DIR or nemo2:DIR"),
            ("--cache-teacher", "teacher_cache.path", str, "DIR",
             "keep the teacher's largest logits there; once they are, no teacher is needed"),
            ("--cache-top-k", "teacher_cache.top_k", int, "K", "how many of each token"),
            ("--out", "output", str, "DIR", "the directory to write"),
            ("--export-format", "export.export_format", str, "KIND",
             "hf for inference engines, megatron, or nemo for NeMo 2"),
            ("--export-dtype", "export.dtype", str, "TYPE",
             "of the weights: auto, float32, bfloat16, float16"),
        ),
    ),
    (
        "training",
        (
            ("--steps", "training.steps", int, "N", "updates of the weights"),
            ("--global-batch-size", "training.global_batch_size", int, "N",
             "sequences in an update"),
            ("--micro-batch-size", "training.micro_batch_size", int, "N",
             "sequences in one forward pass of one process"),
            ("--seq-len", "training.seq_length", int, "N", "tokens in a sequence"),
            ("--recompute", "training.recompute", str, "WHAT",
             "activations to compute again: none, selective or full"),
            ("--lr", "optimizer.lr", float, "X", "learning rate after the warm-up"),
            ("--min-lr", "optimizer.min_lr", float, "X", "learning rate of the last step"),
            ("--warmup-steps", "optimizer.warmup_steps", int, "N", "steps of linear warm-up"),
            ("--save-interval", "checkpoints.interval", int, "N", "steps between checkpoints"),
            ("--keep", "checkpoints.keep", int, "N", "checkpoints to keep"),
            ("--on-bad-step", "guard.action", str, "WHAT",
             "if a loss or gradient is not finite, or jumps: stop or skip"),
        ),
    ),
    (
        "text",
        (
            ("--data", "data.source", str, "SOURCE",
             "text to train on: pydoc, a .txt, .jsonl or .parquet file, or "
             "hf:NAME[,CONFIG][:SPLIT]"),
            ("--num-tokens", "data.num_tokens", int, "N", "tokens to take at most"),
            ("--eval-data", "evaluation.source", str, "SOURCE",
             "other text to evaluate with; otherwise the first tokens are held out"),
            ("--eval-tokens", "evaluation.num_tokens", int, "N", "tokens to evaluate on"),
            ("--eval-seq-len", "evaluation.seq_length", int, "N", "tokens in a sequence"),
            ("--eval-batch-size", "evaluation.micro_batch_size", int, "N",
             "sequences in a micro-batch"),
            ("--eval-interval", "logging.evaluation_interval", int, "N",
             "steps between evaluations"),
            ("--log-interval", "logging.interval", int, "N", "steps between lines of the log"),
            ("--tensorboard", "logging.tensorboard", str, "DIR", "directory of event files"),
        ),
    ),
    (
        "machine",
        (
            ("--tp", "parallel.tensor_parallel_size", int, "N", "tensor-parallel processes"),
            ("--pp", "parallel.pipeline_parallel_size", int, "N", "pipeline stages"),
            ("--vpp", "virtual_pipeline_size", int, "N", "chunks of the model on every stage"),
            ("--cp", "parallel.context_parallel_size", int, "N", "processes that share a sequence"),
            ("--ep", "parallel.expert_parallel_size", int, "N", "expert-parallel processes"),
            ("--dtype", "dtype", str, "TYPE", "to compute in: auto, float32 or bfloat16"),
            ("--device", "device", str, "NAME", "auto, cpu or cuda"),
            ("--seed", "seed", int, "N", "seeds the order of the text"),
        ),
    ),
)  # fmt: skip


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that describe a job."""
    add_config(parser)
    for title, flags in _FLAGS:
        group = parser.add_argument_group(title)
        add_flags(group, flags)
        if title == "machine":
            add_sequence_parallel(group)
    add_set(parser, example="distillation.criterion.temperature=2")


def job_config(args: argparse.Namespace) -> DistillJobConfig:
    """Builds the config: the YAML file, then flags, then ``--set``, later ones winning.

    Raises:
        ConfigError: With the field that is wrong.
    """
    from slimtron_common.config import build_config
    from slimtron_distill.job.config import DistillJobConfig

    flags = config_flags(args, DistillJobConfig)
    return build_config(DistillJobConfig, file=args.config, overrides=args.overrides, flags=flags)
