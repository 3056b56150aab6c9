"""Perplexity of pruned models beside ModelOpt's own call and beside chance.

    python benchmarks/pruning.py MODEL_DIR WORK_DIR [--targets ffn,hidden] [--random 5] [--no-peer]

Slimtron scores the model once and cuts every target from the scores. The peer is ModelOpt's
``mtp.prune`` (Minitron) on the same Megatron-Core model, with the same tokens to score on and the
same held-out tokens to measure with; it needs Transformer Engine, or the stand-in beside this file,
and scores once, too. Chance is the median of random choices of the same shape. ``pp2`` scores,
cuts and measures once more, on two pipeline stages in two processes.

Each number is kept in WORK_DIR once it is there: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

# Not in the processes of a pipeline, which do without.
if __name__ == "__main__" and importlib.util.find_spec("transformer_engine") is None:
    import transformer_engine_standin

    transformer_engine_standin.install()

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from slimtron_common.atomic import atomic_write
from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.checkpoint.writer import write_safetensors
from slimtron_common.data import DataConfig, TokenDataset, held_out_datasets
from slimtron_common.evaluation import evaluate
from slimtron_common.manifest import environment_versions
from slimtron_common.models import Architecture
from slimtron_common.models.counting import count_parameters
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import (
    ParallelConfig,
    ParallelContext,
    forward_only,
    initialize_parallel,
)
from slimtron_common.testing import run_ranks
from slimtron_prune import PruningConfig
from slimtron_prune.cutting import Cutter
from slimtron_prune.job.candidates import measure_selection
from slimtron_prune.scoring.collect import collect_scores
from slimtron_prune.scoring.scores import Scores, load_scores, save_scores
from slimtron_prune.selection import Selection, select
from slimtron_prune.targets import WIDTH_MULTIPLE, target_architecture

_FEWER_HEADS = {"target_num_attention_heads": 2 / 3, "target_num_query_groups": 1}
_FEWER_GROUPS = {"target_num_attention_heads": 2 / 3, "target_num_query_groups": 2 / 3}
_REST = {
    "target_ffn_hidden_size": 2 / 3,
    "target_num_layers": 26 / 30,
    "target_hidden_size": 8 / 9,
}
_TARGETS = {
    "ffn": {"target_ffn_hidden_size": 2 / 3},
    "layers": {"target_num_layers": 26 / 30},
    "hidden": {"target_hidden_size": 8 / 9},
    "heads": _FEWER_HEADS,
    "groups": _FEWER_GROUPS,
    "all-heads": {**_REST, **_FEWER_HEADS},
    "all-groups": {**_REST, **_FEWER_GROUPS},
}
"""Sizes as shares of the model's: of SmolLM2 feed-forward 1024, 26 layers, hidden 512, and 6 query
heads in 3 groups (heads) or 2 (groups), which ModelOpt does not prune."""


class Numbers:
    """What was measured, by name, kept in a file as it comes in."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if kept["settings"] != settings:
            raise SystemExit(f"{path} has numbers of other settings: {kept['settings']}")
        self.kept = kept

    def get(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self.kept:
            self.kept[name] = measure()
            atomic_write(self._path, json.dumps(self.kept, indent=1) + "\n")
            print(f"{name}: {self.kept[name]:.4g}", flush=True)
        return float(self.kept[name])


@dataclass
class Row:
    target: str
    parameters: int
    perplexity: float
    chance: float | None
    peer: float | None
    seconds: float


@dataclass
class Bench:
    checkpoint: Checkpoint
    context: ParallelContext
    dtype: torch.dtype
    evaluation: list[torch.Tensor]
    scoring: list[torch.Tensor]
    work: Path

    def score(self) -> Scores:
        model = _load(self, "local")
        return collect_scores(model, self.scoring, self.checkpoint.architecture, self.context)

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
    parser.add_argument("work", type=Path, help="where numbers and scores are kept")
    parser.add_argument("--targets", default=",".join(_TARGETS))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--random", type=int, default=5, help="random choices of each shape")
    parser.add_argument("--no-peer", action="store_true", help="leave ModelOpt out")
    parser.add_argument("--no-pp2", action="store_true", help="leave the pipeline out")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    names = ("device", "data", "eval_tokens", "score_tokens")
    numbers = Numbers(args.work / "numbers.json", {name: vars(args)[name] for name in names})
    checkpoint = open_checkpoint(f"hf:{args.model}")
    text = DataConfig(source=args.data, num_tokens=args.eval_tokens)
    evaluation, scoring = held_out_datasets(
        text, replace(text, num_tokens=args.score_tokens), checkpoint.tokenizer()
    )
    rows = []
    with initialize_parallel(device=args.device) as context:
        dtype = checkpoint.compute_dtype("auto", context.device.type)
        bench = Bench(
            checkpoint, context, dtype, evaluation.batches(2), scoring.batches(2), args.work
        )
        numbers.get("original", lambda: _perplexity(_load(bench, "local"), bench))
        numbers.get("seconds to score", lambda: _score(bench))
        for name in args.targets.split(","):
            rows.append(_measure(name, bench, numbers, args.random, peer=not args.no_peer))
    if not args.no_pp2:
        ours = f"{rows[-1].target}, two stages"
        numbers.get(ours, lambda: _on_two_stages(rows[-1].target, args.model, bench))
    _print(rows, numbers, evaluation, scoring, dtype)


def _score(bench: Bench) -> float:
    """Writes the scores, and returns how long they took."""
    folder = _scores_folder(bench)
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    save_scores(folder, bench.score())
    return time.perf_counter() - start


def _scores_folder(bench: Bench) -> Path:
    return bench.work / "scores"


def _measure(name: str, bench: Bench, numbers: Numbers, num_random: int, *, peer: bool) -> Row:
    source = bench.checkpoint.architecture
    target = _target(name, source)
    scores = load_scores(_scores_folder(bench), source)
    chance = [
        numbers.get(
            f"{name}, chance {seed}",
            lambda seed=seed: bench.perplexity(select(target, _random_scores(scores, seed))),
        )
        for seed in range(num_random)
    ]
    perplexity = numbers.get(name, lambda: bench.perplexity(select(target, scores)))
    seconds = numbers.get(f"{name}, seconds to cut", lambda: _seconds_to_cut(target, bench))
    # ModelOpt does not prune query groups.
    peer = peer and target.num_query_groups == source.num_query_groups
    return Row(
        target=name,
        parameters=sum(count_parameters(target).values()),
        perplexity=perplexity,
        chance=statistics.median(chance) if chance else None,
        peer=numbers.get(f"{name}, ModelOpt", lambda: _peer(bench, target)) if peer else None,
        seconds=seconds,
    )


def _target(name: str, source: Architecture) -> Architecture:
    sizes = {
        field: _share(getattr(source, field.removeprefix("target_")), share, field)
        for field, share in _TARGETS[name].items()
    }
    return target_architecture(source, PruningConfig(**sizes))


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


def _seconds_to_cut(target: Architecture, bench: Bench) -> float:
    """Reading scores that are there, and reading, cutting and writing the weights; of three."""
    return min(_cut_once(target, bench) for _ in range(3))


def _cut_once(target: Architecture, bench: Bench) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        scores = load_scores(_scores_folder(bench), bench.checkpoint.architecture)
        tensors = Cutter(select(target, scores)).tensors(bench.checkpoint.tensors.read)
        write_safetensors(Path(folder), tensors, bench.context)
        return time.perf_counter() - start


def _on_two_stages(name: str, model_dir: Path, bench: Bench) -> float:
    """The perplexity of what two pipeline stages score, cut and measure."""
    batches = (bench.evaluation, bench.scoring)
    results = run_ranks(_stage, 2, name, model_dir, *batches, bench.dtype, timeout=3600)
    return float(results[0])


def _stage(
    rank: int,
    world_size: int,
    name: str,
    model_dir: Path,
    evaluation: list[torch.Tensor],
    scoring: list[torch.Tensor],
    dtype: torch.dtype,
) -> float:
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    with initialize_parallel(
        ParallelConfig(pipeline_parallel_size=world_size), device="cpu"
    ) as context:
        bench = Bench(checkpoint, context, dtype, evaluation, scoring, Path())
        return bench.perplexity(select(_target(name, checkpoint.architecture), bench.score()))


def _peer(bench: Bench, target: Architecture) -> float:
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    source = bench.checkpoint.architecture
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
            config={
                "forward_loop": lambda m: forward_only(m, bench.scoring, bench.context),
                "checkpoint": str(bench.work / "modelopt.pth"),
            },
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
    numbers: Numbers,
    evaluation: TokenDataset,
    scoring: TokenDataset,
    dtype: torch.dtype,
) -> None:
    seconds = numbers.kept["seconds to score"]
    table = Table(
        "target", "parameters", "perplexity", "ModelOpt", "chance, median", "cut", "faster",
        title=f"original {numbers.kept['original']:.2f}; scored in {seconds:.1f} s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.target,
            f"{row.parameters:,}",
            f"{row.perplexity:.2f}",
            "-" if row.peer is None else f"{row.peer:.2f}",
            "-" if row.chance is None else f"{row.chance:.2f}",
            f"{row.seconds:.2f} s",
            f"{(seconds + row.seconds) / row.seconds:.0f}x",
        )
    console = Console(width=100)
    console.print(table)
    for name, value in numbers.kept.items():
        if name.endswith("two stages"):
            console.print(f"{name}: {value:.6f}, on one {numbers.kept[name.split(',')[0]]:.6f}")
    versions = ", ".join(f"{name} {version}" for name, version in environment_versions().items())
    console.print(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, {dtype}; "
        f"scored on {scoring.tokens.size} tokens, measured on {evaluation.tokens.size} others; "
        f"{versions}"
    )


if __name__ == "__main__":
    main()
