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
from slimtron_quant.recipes.kv_cache import KV_CACHE_QFORMATS

if TYPE_CHECKING:
    from slimtron_quant.job.config import QuantJobConfig

__all__ = ["add_job_arguments", "job_config"]

_FLAGS: tuple[tuple[str, tuple[Flag, ...]], ...] = (
    (
        "what",
        (
            ("--model", "model", str, "KIND:DIR", "hf:DIR, megatron:DIR or nemo2:DIR"),
            ("--recipe", "quantization.algorithm", str, "NAME",
             "see `slimtron-quant recipes`; modelopt:NAME, a .yaml or .json file, or none"),
            ("--out", "export.path", str, "DIR", "the directory to write"),
            ("--export-format", "export.export_format", str, "KIND",
             "hf for inference engines; megatron, or nemo for NeMo 2, to train on"),
            ("--export-dtype", "export.dtype", str, "TYPE", "of unquantized weights: bf16, 16, 32"),
            ("--sq-alpha", "quantization.sq_alpha", float, "A", "SmoothQuant's strength, 0 to 1"),
        ),
    ),
    (
        "mixed precision",
        (
            ("--bits", "mixed.bits", float, "N",
             "budget: stored bits for each weight of the linear layers, scales included"),
            ("--size", "mixed.size", str, "SIZE", "budget: all weight files, 80MB or 1.5GiB"),
            ("--candidates", "mixed.candidates", str, "NAME,NAME",
             "recipes to choose from for each layer; none leaves it as it is"),
            ("--sensitivity", "mixed.sensitivity", str, "FILE",
             "an earlier run's sensitivity.json, to choose without measuring again"),
            ("--sensitivity-tokens", "mixed.sensitivity_tokens", int, "N",
             "tokens to measure the sensitivity of each layer on"),
        ),
    ),
    (
        "text",
        (
            ("--data", "quantization.calibration_dataset", str, "SOURCE",
             "text to calibrate and evaluate with: pydoc, a .txt, .jsonl or .parquet file, or "
             "hf:NAME[,CONFIG][:SPLIT]"),
            ("--calib-size", "quantization.calibration_dataset_size", int, "N", "sequences"),
            ("--calib-seq-len", "quantization.calibration_seq_len", int, "N", "tokens in one"),
            ("--calib-batch-size", "quantization.calibration_batch_size", int, "N",
             "sequences in a micro-batch"),
            ("--min-expert-tokens", "quantization.min_expert_tokens", int, "N",
             "report experts that saw fewer"),
            ("--eval-data", "evaluation.source", str, "SOURCE", "other text to evaluate with"),
            ("--eval-tokens", "evaluation.num_tokens", int, "N", "tokens to evaluate on"),
            ("--eval-seq-len", "evaluation.seq_length", int, "N", "tokens in a sequence"),
            ("--eval-batch-size", "evaluation.micro_batch_size", int, "N",
             "sequences in a micro-batch"),
        ),
    ),
    (
        "quality gate",
        (
            ("--max-perplexity-increase", "gate.max_perplexity_increase", str, "SHARE",
             "exit with 3 if the perplexity rises by more, such as 5%%"),
            ("--min-agreement", "gate.min_agreement", str, "SHARE",
             "exit with 3 if fewer of the likeliest tokens stay the same, such as 0.9"),
        ),
    ),
    (
        "machine",
        (
            ("--tp", "parallel.tensor_parallel_size", int, "N", "tensor-parallel processes"),
            ("--pp", "parallel.pipeline_parallel_size", int, "N", "pipeline stages"),
            ("--cp", "parallel.context_parallel_size", int, "N", "processes that share a sequence"),
            ("--ep", "parallel.expert_parallel_size", int, "N",
             "processes that share out a mixture's experts"),
            ("--dtype", "dtype", str, "TYPE", "to compute in: auto, float32, bfloat16, float16"),
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
        if title == "what":
            group.add_argument(
                "--block-size",
                dest="quantization.awq_block_size",
                type=_block_size,
                metavar="N",
                help="channels that share a scale in the recipes with blocks, or auto",
            )
            group.add_argument(
                "--kv-cache",
                dest="quantization.kv_cache",
                choices=(*KV_CACHE_QFORMATS, "none"),
                help="quantize the KV cache too, or with `--recipe none` alone",
            )
            group.add_argument(
                "--exclude",
                dest="quantization.exclude",
                action="append",
                metavar="PATTERN",
                help="modules to leave as they are; may be repeated",
            )
            group.add_argument(
                "--include",
                dest="quantization.include",
                action="append",
                metavar="PATTERN",
                help="the only modules to quantize; may be repeated",
            )
            group.add_argument(
                "--override",
                dest="quantization.overrides",
                action="append",
                type=_override,
                metavar="PATTERN=NAME",
                help="another recipe for these modules, or none; may be repeated",
            )
        if title == "text":
            group.add_argument(
                "--calibrate-all-experts",
                dest="quantization.calibrate_all_experts",
                action="store_true",
                default=None,
                help="calibrate every expert on every token; outputs stay as routed",
            )
        if title == "machine":
            group.add_argument(
                "--layerwise",
                action="store_true",
                default=None,
                help="hold one layer at a time, for a model that does not fit",
            )
            add_sequence_parallel(group)
    add_set(parser, example="parallel.tensor_parallel_size=2")


def job_config(args: argparse.Namespace) -> QuantJobConfig:
    """Builds the config: the YAML file, then flags, then ``--set``, later ones winning.

    Raises:
        ConfigError: With the field that is wrong.
    """
    from slimtron_common.config import build_config
    from slimtron_quant.job.config import QuantJobConfig

    flags = config_flags(args, QuantJobConfig)
    if (overrides := flags["quantization.overrides"]) is not None:
        flags["quantization.overrides"] = dict(overrides)
    if (candidates := flags["mixed.candidates"]) is not None:
        flags["mixed.candidates"] = [name.strip() for name in candidates.split(",")]
    if (kv_cache := flags.pop("quantization.kv_cache")) is not None:
        flags["quantization.enable_kv_cache"] = kv_cache != "none"
        if kv_cache != "none":
            flags["quantization.kv_cache_qformat"] = kv_cache
    settings = args.overrides
    if flags["quantization.algorithm"] == "none":
        # A flag that is None counts as not given.
        flags["quantization.algorithm"] = None
        settings = ["quantization.algorithm=null", *settings]
    return build_config(QuantJobConfig, file=args.config, overrides=settings, flags=flags)


def _override(text: str) -> tuple[str, str | None]:
    pattern, equals, recipe = text.rpartition("=")
    if not equals or not pattern or not recipe:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=NAME")
    return pattern, None if recipe in ("none", "null") else recipe


def _block_size(text: str) -> int | str:
    return text if text == "auto" else int(text)
