"""The arguments that the subcommands share, and the configs that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slimtron_common.job_arguments import (
    Flag,
    add_config,
    add_flags,
    add_sequence_parallel,
    add_set,
    config_flags,
)

if TYPE_CHECKING:
    from slimtron_prune.job.config import PruneJobConfig, ScoreJobConfig

__all__ = ["add_prune_arguments", "add_score_arguments", "prune_config", "score_config"]

_SIZES: tuple[Flag, ...] = (
    ("--ffn-hidden-size", "pruning.target_ffn_hidden_size", int, "N", "feed-forward width"),
    ("--hidden-size", "pruning.target_hidden_size", int, "N", "width of the residual stream"),
    ("--num-attention-heads", "pruning.target_num_attention_heads", int, "N", "query heads"),
    ("--num-query-groups", "pruning.target_num_query_groups", int, "N", "key/value heads"),
    ("--num-layers", "pruning.target_num_layers", int, "N", "layers"),
    ("--mamba-num-heads", "pruning.target_mamba_num_heads", int, "N", "heads of Mamba layers"),
    ("--mamba-head-dim", "pruning.target_mamba_head_dim", int, "N", "width of a Mamba head"),
    ("--num-moe-experts", "pruning.target_num_moe_experts", int, "N", "experts of a layer"),
    ("--moe-ffn-hidden-size", "pruning.target_moe_ffn_hidden_size", int, "N",
     "width of an expert"),
    ("--moe-shared-expert-intermediate-size",
     "pruning.target_moe_shared_expert_intermediate_size", int, "N",
     "width of the expert that serves all tokens"),
)  # fmt: skip

_BUDGET: tuple[Flag, ...] = (
    ("--target-params", "search.target_params", str, "N", "most parameters, such as 100M"),
    ("--target-memory", "search.target_memory", str, "SIZE",
     "most bytes of weights and KV cache, such as 1GiB"),
    ("--target-ratio", "search.target_ratio", float, "X", "most parameters, such as 0.75"),
    ("--memory-batch-size", "search.memory_batch_size", int, "N", "sequences in the KV cache"),
    ("--memory-seq-len", "search.memory_seq_length", int, "N", "tokens in each of them"),
    ("--candidates", "search.num_candidates", int, "N", "shapes to cut and measure"),
)  # fmt: skip

_SCORING: tuple[Flag, ...] = (
    ("--data", "scoring.source", str, "SOURCE",
     "text to score and evaluate with: pydoc, a .txt, .jsonl or .parquet file, or "
     "hf:NAME[,CONFIG][:SPLIT]"),
    ("--score-tokens", "scoring.num_tokens", int, "N", "tokens to score on"),
    ("--score-seq-len", "scoring.seq_length", int, "N", "tokens in a sequence"),
    ("--score-batch-size", "scoring.micro_batch_size", int, "N", "sequences in a micro-batch"),
)  # fmt: skip

_EVALUATION: tuple[Flag, ...] = (
    ("--eval-data", "evaluation.source", str, "SOURCE", "other text to evaluate with"),
    ("--eval-tokens", "evaluation.num_tokens", int, "N", "tokens to evaluate on"),
    ("--eval-seq-len", "evaluation.seq_length", int, "N", "tokens in a sequence"),
    ("--eval-batch-size", "evaluation.micro_batch_size", int, "N", "sequences in a micro-batch"),
)

_GATE: tuple[Flag, ...] = (
    ("--max-perplexity-increase", "gate.max_perplexity_increase", str, "SHARE",
     "exit with 3 if the perplexity rises by more, such as 50%%"),
    ("--min-agreement", "gate.min_agreement", str, "SHARE",
     "exit with 3 if fewer of the likeliest tokens stay the same, such as 0.7"),
)  # fmt: skip

_MACHINE: tuple[Flag, ...] = (
    ("--tp", "parallel.tensor_parallel_size", int, "N", "tensor-parallel processes"),
    ("--pp", "parallel.pipeline_parallel_size", int, "N", "pipeline stages"),
    ("--ep", "parallel.expert_parallel_size", int, "N", "processes that share experts out"),
    ("--dtype", "dtype", str, "TYPE", "to compute in: auto, float32, bfloat16, float16"),
    ("--device", "device", str, "NAME", "auto, cpu or cuda"),
    ("--seed", "seed", int, "N", "seeds the order of the text"),
)


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that describe a pruning job."""
    what = _add_model(parser)
    add_flags(what, (("--out", "export.path", str, "DIR", "the directory to write"),))
    format_help = "hf for inference engines, megatron, or nemo for NeMo 2"
    add_flags(what, (("--export-format", "export.export_format", str, "KIND", format_help),))
    add_flags(what, (("--scores", "scores", str, "DIR", "what `slimtron-prune score` wrote"),))
    sizes = parser.add_argument_group("sizes to prune to")
    add_flags(sizes, _SIZES)
    sizes.add_argument(
        "--drop-layers",
        dest="pruning.drop_layers",
        type=_numbers,
        metavar="N,N",
        help="instead of sizes: the layers that go, counted from 1",
    )
    budget = parser.add_argument_group("or a budget, for which the sizes are searched")
    add_flags(budget, _BUDGET)
    budget.add_argument(
        "--bound",
        dest="search.bounds",
        action="append",
        type=_bound,
        metavar="NAME=LOW:HIGH",
        help="sizes to search among, such as num_layers=20:30; may be repeated",
    )
    text = parser.add_argument_group("text")
    add_flags(text, _SCORING)
    add_flags(text, _EVALUATION)
    add_flags(parser.add_argument_group("quality gate"), _GATE)
    _add_machine(parser)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that describe a scoring job."""
    what = _add_model(parser)
    add_flags(what, (("--out", "path", str, "DIR", "the directory to write"),))
    add_flags(parser.add_argument_group("text"), _SCORING)
    _add_machine(parser)


def prune_config(args: argparse.Namespace) -> PruneJobConfig:
    """Builds the config: the YAML file, then flags, then ``--set``, later ones winning.

    Raises:
        ConfigError: With the field that is wrong.
    """
    from slimtron_common.config import build_config
    from slimtron_prune.job.config import PruneJobConfig

    flags = config_flags(args, PruneJobConfig)
    if (bounds := flags.get("search.bounds")) is not None:
        flags["search.bounds"] = dict(bounds)
    return build_config(PruneJobConfig, file=args.config, overrides=args.overrides, flags=flags)


def score_config(args: argparse.Namespace) -> ScoreJobConfig:
    """Builds the config of a scoring job as ``prune_config`` does."""
    from slimtron_common.config import build_config
    from slimtron_prune.job.config import ScoreJobConfig

    flags = config_flags(args, ScoreJobConfig)
    return build_config(ScoreJobConfig, file=args.config, overrides=args.overrides, flags=flags)


def _add_model(parser: argparse.ArgumentParser) -> Any:
    add_config(parser)
    what = parser.add_argument_group("what")
    add_flags(what, (("--model", "model", str, "KIND:DIR", "hf:DIR, megatron:DIR or nemo2:DIR"),))
    return what


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    add_flags(machine, _MACHINE)
    add_sequence_parallel(machine)
    add_set(parser, example="export.check_transformers=false")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _bound(text: str) -> tuple[str, tuple[int, int]]:
    name, equals, bounds = text.partition("=")
    low, colon, high = bounds.partition(":")
    if not (equals and colon and low.isdigit() and high.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=LOW:HIGH")
    return name, (int(low), int(high))
