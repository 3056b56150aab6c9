"""Perplexity of pruned models beside ModelOpt's own call and beside chance.

    python benchmarks/pruning.py MODEL_DIR [--targets ffn,hidden] [--random 5] [--no-peer]

Slimtron scores the model once and cuts every target from the scores. The peer is ModelOpt's
``mtp.prune`` (Minitron) on the same Megatron-Core model, with the same tokens to score on and the
same held-out tokens to measure with; it needs Transformer Engine, or the stand-in beside this file.
Chance is the median of random choices of the same shape.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

if importlib.util.find_spec("transformer_engine") is None:
    import transformer_engine_standin

    transformer_engine_standin.install()

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.checkpoint.writer import write_safetensors
from slimtron_common.data import DataConfig, TokenDataset, held_out_datasets
from slimtron_common.evaluation import evaluate
from slimtron_common.manifest import environment_versions
from slimtron_common.models import Architecture
from slimtron_common.models.counting import count_parameters
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_prune import PruningConfig
from slimtron_prune.cutting import Cutter
from slimtron_prune.job.candidates import measure_selection
from slimtron_prune.scoring.collect import collect_scores
from slimtron_prune.scoring.scores import Scores
from slimtron_prune.selection import Selection, select
from slimtron_prune.targets import WIDTH_MULTIPLE, target_architecture

_TARGETS = {
    "ffn": {"target_ffn_hidden_size": 2 / 3},
    "layers": {"target_num_layers": 26 / 30},
    "hidden": {"target_hidden_size": 8 / 9},
    "heads": {"target_num_attention_heads": 2 / 3, "target_num_query_groups": 1},
    "groups": {"target_num_attention_heads": 2 / 3, "target_num_query_groups": 2 / 3},
    "all": {
        "target_ffn_hidden_size": 2 / 3,
        "target_num_layers": 26 / 30,
        "target_hidden_size": 8 / 9,
        "target_num_attention_heads": 2 / 3,
        "target_num_query_groups": 2 / 3,
    },
}
"""Sizes as shares of the model's: of SmolLM2 feed-forward 1024, 26 layers, hidden 512, and 6 query
heads in 3 groups (heads) or 2 (groups)."""


@dataclass
class Row:
    target: str
    parameters: int
    perplexity: float
    chance: float | None
    peer: float | None
    cut_seconds: float


@dataclass
class Bench:
    checkpoint: Checkpoint
    context: ParallelContext
    dtype: torch.dtype
    evaluation: list[torch.Tensor]
    scoring: list[torch.Tensor]

    def perplexity(self, selection: Selection) -> float:
        found = measure_selection(
            selection,
            self.checkpoint.tensors.read,
            self.evaluation,
            self.context,
            dtype=self.dtype,
            layer_spec="local",
        )
        gc.collect()
        return found.perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--targets", default=",".join(_TARGETS))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--random", type=int, default=5, help="random choices of each shape")
    parser.add_argument("--no-peer", action="store_true", help="leave ModelOpt out")
    args = parser.parse_args()
    checkpoint = open_checkpoint(f"hf:{args.model}")
    text = DataConfig(source=args.data, num_tokens=args.eval_tokens)
    evaluation, scoring = held_out_datasets(
        text, replace(text, num_tokens=args.score_tokens), checkpoint.tokenizer()
    )
    rows = []
    with initialize_parallel(device=args.device) as context:
        dtype = checkpoint.compute_dtype("auto", context.device.type)
        bench = Bench(checkpoint, context, dtype, evaluation.batches(2), scoring.batches(2))
        model = _load(bench, "local")
        original = _perplexity(model, bench)
        start = time.perf_counter()
        scores = collect_scores(model, bench.scoring, checkpoint.architecture, context)
        score_seconds = time.perf_counter() - start
        del model
        for name in args.targets.split(","):
            rows.append(_measure(name, bench, scores, args.random, peer=not args.no_peer))
            print(rows[-1], flush=True)
    _print(rows, original, score_seconds, evaluation, scoring, dtype)


def _measure(name: str, bench: Bench, scores: Scores, num_random: int, *, peer: bool) -> Row:
    source = bench.checkpoint.architecture
    sizes = {
        field: _share(getattr(source, field.removeprefix("target_")), share, field)
        for field, share in _TARGETS[name].items()
    }
    target = target_architecture(source, PruningConfig(**sizes))
    selection = select(target, scores)
    chance = [
        bench.perplexity(select(target, _random_scores(scores, seed))) for seed in range(num_random)
    ]
    return Row(
        target=name,
        parameters=sum(count_parameters(target).values()),
        perplexity=bench.perplexity(selection),
        chance=statistics.median(chance) if chance else None,
        peer=_peer(bench, target) if peer else None,
        cut_seconds=_seconds_to_cut(selection, bench),
    )


def _share(size: int, share: float, field: str) -> int:
    step = WIDTH_MULTIPLE if field.endswith("hidden_size") else 1
    return round(size * share / step) * step


def _random_scores(scores: Scores, seed: int) -> Scores:
    """Chance decides what is kept; norms are scaled to it as ever."""
    generator = torch.Generator().manual_seed(seed)
    sums = {
        name: value
        if name in ("num_tokens", "residual", "final_residual")
        else torch.rand(value.shape, generator=generator, dtype=value.dtype)
        for name, value in scores.sums.items()
    }
    return Scores(scores.architecture, sums)


def _seconds_to_cut(selection: Selection, bench: Bench) -> float:
    """Reading, cutting and writing the weights, from scores that are there."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tensors = Cutter(selection).tensors(bench.checkpoint.tensors.read)
        write_safetensors(Path(folder), tensors, bench.context)
        return time.perf_counter() - start


def _peer(bench: Bench, target: Architecture) -> float | None:
    """ModelOpt's perplexity; None for what it does not prune: query groups."""
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    source = bench.checkpoint.architecture
    if target.num_query_groups != source.num_query_groups:
        return None
    names = ("ffn_hidden_size", "hidden_size", "num_attention_heads", "num_layers")
    sizes = {
        name: getattr(target, name)
        for name in names
        if getattr(target, name) != getattr(source, name)
    }
    model = _load(bench, "transformer_engine")
    with contextlib.redirect_stdout(io.StringIO()), _scalars_gathered():
        mtp.prune(
            model,
            # Every size is allowed that is allowed here.
            mode=[
                (
                    "mcore_minitron",
                    get_mcore_minitron_config(
                        hidden_size_divisor=8, ffn_hidden_size_divisor=8, num_layers_divisor=1
                    ),
                )
            ],
            constraints={"export_config": sizes},
            dummy_input=None,
            config={"forward_loop": lambda m: forward_only(m, bench.scoring, bench.context)},
        )
    return _perplexity(model, bench)


@contextlib.contextmanager
def _scalars_gathered() -> Iterator[None]:
    """Gives gloo a vector of one where ModelOpt gathers a number, which only NCCL takes."""
    gather = dist.all_gather_into_tensor

    def wrapped(output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> Any:
        return gather(output, tensor.reshape(-1), **options)

    dist.all_gather_into_tensor = wrapped
    try:
        yield
    finally:
        dist.all_gather_into_tensor = gather


def _load(bench: Bench, layer_spec: Any) -> Any:
    model = build_model(
        bench.checkpoint.architecture, bench.context, dtype=bench.dtype, layer_spec=layer_spec
    )
    bench.checkpoint.load(model, bench.context)
    return model


def _perplexity(model: Any, bench: Bench) -> float:
    vocab_size = bench.checkpoint.architecture.vocab_size
    return evaluate(model, bench.evaluation, bench.context, vocab_size=vocab_size).perplexity


def _print(
    rows: list[Row],
    original: float,
    score_seconds: float,
    evaluation: TokenDataset,
    scoring: TokenDataset,
    dtype: torch.dtype,
) -> None:
    table = Table(
        "target", "parameters", "perplexity", "ModelOpt", "chance, median", "cut",
        title=f"original {original:.2f}; scored in {score_seconds:.1f} s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.target,
            f"{row.parameters:,}",
            f"{row.perplexity:.2f}",
            "-" if row.peer is None else f"{row.peer:.2f}",
            "-" if row.chance is None else f"{row.chance:.2f}",
            f"{row.cut_seconds:.2f} s",
        )
    console = Console(width=100)
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in environment_versions().items())
    console.print(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, {dtype}; "
        f"scored on {scoring.tokens.size} tokens, measured on {evaluation.tokens.size} others; "
        f"{versions}"
    )


if __name__ == "__main__":
    main()
