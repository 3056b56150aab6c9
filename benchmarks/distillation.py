"""What a step of distillation costs, in all and by part, against plain training of the student.

    python benchmarks/distillation.py                  Llama 3.2 3B teaches 1B, on a GPU
    python benchmarks/distillation.py --nemo DIR       NeMo 2.7.3 unpacked in DIR
    python benchmarks/distillation.py --shrink 16 --vocab 512 --seq-length 64    on a CPU
    torchrun --nproc-per-node 2 benchmarks/distillation.py --tp 2

Random tokens run through models with random weights, with everything that a job does in a step:
teacher, student, loss, backward, reduction, clipping, AdamW. The loss is the forward KL of the
logits: with output layers and loss in one (as jobs do), on whole logits, and on whole logits by the
code of NeMo, where nemo-toolkit is there (only the file with its loss is loaded). The first steps
are not counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from kd_loss import nemo_module, optional
from rich.console import Console
from rich.table import Table

from slimtron_common.manifest import environment_versions
from slimtron_common.memory import peak_memory
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelConfig, ParallelContext, initialize_parallel
from slimtron_distill import DistillationConfig, distillation_task
from slimtron_distill.training.config import GuardConfig, OptimizerConfig, TrainingConfig
from slimtron_distill.training.recompute import RECOMPUTE
from slimtron_distill.training.trainer import Trainer

STUDENT = {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64}
TEACHER = {"num_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128}
FFN, GROUPS = 8192, 8
PARTS = ("teacher", "student", "loss", "optimizer")
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shrink", type=int, default=1, help="divides widths, depths and heads")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="selective")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--nemo", type=Path, help="folder that holds NeMo's package `nemo`")
    args = parser.parse_args()
    parallel = ParallelConfig(
        tensor_parallel_size=args.tp,
        pipeline_parallel_size=args.pp,
        sequence_parallel=args.tp > 1,
    )
    with initialize_parallel(parallel) as context:
        device = context.device.type
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        table = Table(
            title=f"Llama 3.2 3B teaches 1B, their sizes divided by {args.shrink}, "
            f"{args.micro_batches} x {args.micro_batch_size} x {args.seq_length} tokens a step and "
            f"copy, recomputed: {args.recompute}, {context.world_size} x {name}, {date.today()}"
        )
        headers = ("step of", "seconds", "tokens/s", *PARTS, "backward and rest", "peak memory")
        for header in headers:
            table.add_column(header, justify="right")
        tasks: dict[str, Callable[..., Any]] = {"plain training": language_task}
        with optional("NeMo"):
            loss = nemo_module(args.nemo).LogitsKLLoss(
                SimpleNamespace(tensor_model_parallel_size=args.tp)
            )
            tasks["distillation, NeMo's loss"] = partial(nemo_task, loss)
        tasks["distillation, whole logits"] = partial(our_task, logit_bytes=None)
        logit_bytes = TrainingConfig(steps=1).logit_bytes
        tasks["distillation"] = partial(our_task, logit_bytes=logit_bytes)
        for what, task in tasks.items():
            seconds, parts = measure(args, context, task)
            tokens = args.micro_batches * args.micro_batch_size * args.seq_length
            rest = seconds - sum(parts.values())
            table.add_row(
                what,
                f"{seconds:.3f}",
                f"{tokens * context.dp_size / seconds:,.0f}",
                *(f"{parts[part]:.3f}" if part in parts else "" for part in PARTS),
                f"{rest:.3f}",
                f"{peak_memory(device) / 2**30:.2f} GiB",
            )
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        if context.is_main:
            Console(width=150).print(table)
            print(
                ", ".join(f"{name} {version}" for name, version in environment_versions().items())
            )


def measure(
    args: argparse.Namespace, context: ParallelContext, make: Callable[..., Any]
) -> tuple[float, dict[str, float]]:
    """Median seconds of a step, and of its parts."""
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size = args.micro_batches * args.micro_batch_size * context.dp_size
    trainer = Trainer(
        make(args, context),
        context,
        training=TrainingConfig(
            steps=args.steps,
            seq_length=args.seq_length,
            global_batch_size=size,
            micro_batch_size=args.micro_batch_size,
        ),
        optimizer=OptimizerConfig(),
        guard=GuardConfig(),
        seed=0,
    )
    clock = Clock(trainer, context.device.type)
    seconds, parts = [], []
    for _ in range(args.steps):
        batches = [random_batch(args, context) for _ in range(args.micro_batches)]
        begin = time.perf_counter()
        trainer.train_step(batches)
        clock.synchronize()
        seconds.append(time.perf_counter() - begin)
        parts.append(clock.read())
    names = parts[0]
    medians = {name: statistics.median(step[name] for step in parts[WARM_UP:]) for name in names}
    return statistics.median(seconds[WARM_UP:]), medians


class Clock:
    """Times of a step's parts: CUDA events on the GPU, the wall clock on the CPU."""

    def __init__(self, trainer: Trainer, device: str) -> None:
        self._cuda = device == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        task: Any = trainer.task
        for chunk in task.chunks:
            teacher = getattr(chunk, "teacher", None)
            self._wrap(chunk if teacher is None else chunk.module, "forward", "student")
            if teacher is not None:
                self._wrap(teacher, "forward", "teacher")
        self._wrap(task, "losses", "loss")
        self._wrap(trainer.optimizer, "step", "optimizer")

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            result = function(*args, **kwargs)
            self._spans[name].append((begin, self._now()))
            return result

        setattr(owner, method, timed)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def read(self) -> dict[str, float]:
        """Seconds since the last call, by part."""
        sums = {
            name: sum(a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in spans)
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return sums


def our_task(args: argparse.Namespace, context: ParallelContext, logit_bytes: int | None) -> Any:
    return distillation_task(
        build(architecture(args, STUDENT), context, args.recompute),
        build(architecture(args, TEACHER), context, "none"),
        DistillationConfig(),
        context,
        vocab_size=args.vocab,
        logit_bytes=logit_bytes,
    )


def nemo_task(loss: Any, args: argparse.Namespace, context: ParallelContext) -> Any:
    """The same models and schedule with the code of NeMo's loss."""
    task = our_task(args, context, None)

    def losses(output: Any, labels: Any, mask: Any) -> Any:
        student, teacher = (logits.transpose(0, 1) for logits in output)
        total, count = (loss(student, teacher)[0].reshape_as(mask.t()) * mask.t()).sum(), mask.sum()
        return total, count.int(), {"logits_loss": torch.stack([total.detach(), count])}

    task.losses = losses
    return task


def language_task(args: argparse.Namespace, context: ParallelContext) -> Any:
    return LanguageTask(build(architecture(args, STUDENT), context, args.recompute), context)


class LanguageTask:
    """The student trained on the text itself, by Megatron's own loss."""

    adjust_tensor_shapes_fn = None

    def __init__(self, chunks: list[Any], context: ParallelContext) -> None:
        self.chunks = self.student_chunks = [chunk.requires_grad_(True) for chunk in chunks]
        self.context = context

    def forward_step(self, iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        tokens, mask = batch["tokens"], batch["loss_mask"]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output = model(tokens, positions, None, labels=batch["labels"])
        return output, lambda output: self.losses(output, mask)

    def losses(self, output: Any, mask: Any) -> Any:
        total, count = (output.float() * mask).sum(), mask.sum()
        return total, count.int(), {"loss": torch.stack([total.detach(), count])}

    def collect(self, losses: Any) -> Any:
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for part in losses:
            sums += part["loss"]
        torch.distributed.all_reduce(sums, group=self.context.pp_group)
        return {"loss": sums}

    def observe(self, losses: Any) -> None:
        pass


def architecture(args: argparse.Namespace, shape: dict[str, int]) -> Architecture:
    smaller = {name: max(2, size // args.shrink) for name, size in shape.items()}
    groups = max(2, GROUPS // args.shrink)
    return Architecture(
        family="llama",
        **{**smaller, "num_attention_heads": max(groups, smaller["num_attention_heads"])},
        ffn_hidden_size=FFN // args.shrink,
        num_query_groups=groups,
        vocab_size=args.vocab,
        max_position_embeddings=args.seq_length,
        norm_epsilon=1e-5,
        rotary_base=500000.0,
        tied_embeddings=True,
    )


@torch.no_grad()
def build(shape: Architecture, context: ParallelContext, recompute: str) -> list[Any]:
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    chunks = build_chunks(shape, context, dtype=dtype, settings=RECOMPUTE[recompute])
    generator = torch.Generator(context.device).manual_seed(0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return list(chunks)


def random_batch(args: argparse.Namespace, context: ParallelContext) -> Any:
    shape = (args.micro_batch_size, args.seq_length)
    # All processes of a model replica see the same tokens: they are seeded alike.
    tokens = torch.randint(args.vocab, shape).to(context.device)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": torch.ones(shape, device=context.device),
        "rows": torch.arange(shape[0]),
    }


if __name__ == "__main__":
    main()
