"""What a step of distillation costs, against a step of plain training of the same student.

    python benchmarks/distillation.py [--hidden 4096] [--teacher-layers 16] [--student-layers 8]
    torchrun --nproc-per-node 2 benchmarks/distillation.py --tp 2

Random tokens run through models with random weights and the widths of Llama 8B, at micro-batch
size and sequence length as given, with everything that a job does in a step: teacher, student,
loss, backward, reduction, clipping, AdamW. The first steps warm up and are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import statistics
import time
from datetime import date
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slimtron_common.manifest import environment_versions
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelConfig, ParallelContext, initialize_parallel
from slimtron_distill import DistillationConfig, distillation_task
from slimtron_distill.training.config import GuardConfig, OptimizerConfig, TrainingConfig
from slimtron_distill.training.recompute import RECOMPUTE
from slimtron_distill.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--teacher-layers", type=int, default=16)
    parser.add_argument("--student-layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
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
            title=f"{args.student_layers} layers learn from {args.teacher_layers}, hidden "
            f"{args.hidden}, {args.micro_batches} x {args.micro_batch_size} x {args.seq_length} "
            f"tokens a step and copy, {context.world_size} x {name}, {date.today()}"
        )
        for header in ("step of", "recomputed", "seconds", "tokens/s", "peak memory"):
            table.add_column(header, justify="right")
        for what in ("plain training", "distillation"):
            for recompute in ("none", "full"):
                seconds = measure(args, context, what, recompute)
                tokens = args.micro_batches * args.micro_batch_size * args.seq_length
                table.add_row(
                    what,
                    recompute,
                    f"{seconds:.3f}",
                    f"{tokens * context.dp_size / seconds:,.0f}",
                    f"{peak_memory(device) / 2**30:.2f} GiB",
                )
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
        if context.is_main:
            Console(width=120).print(table)
            print(
                ", ".join(f"{name} {version}" for name, version in environment_versions().items())
            )


def measure(args: argparse.Namespace, context: ParallelContext, what: str, recompute: str) -> float:
    """Median seconds of a step."""
    teacher = architecture(args, args.teacher_layers)
    student = dataclasses.replace(teacher, num_layers=args.student_layers)
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if what == "plain training":
        task: Any = LanguageTask(build(student, context, dtype, recompute), context)
    else:
        task = distillation_task(
            build(student, context, dtype, recompute),
            build(teacher, context, dtype, "none"),
            DistillationConfig(),
            context,
            vocab_size=args.vocab,
        )
    size = args.micro_batches * args.micro_batch_size * context.dp_size
    trainer = Trainer(
        task,
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
    seconds = []
    for _ in range(args.steps):
        batches = [random_batch(args, context) for _ in range(args.micro_batches)]
        begin = time.perf_counter()
        trainer.train_step(batches)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


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

        def loss(output: Any) -> Any:
            total, count = (output.float() * mask).sum(), mask.sum()
            return total, count.int(), {"loss": torch.stack([total.detach(), count])}

        return output, loss

    def collect(self, losses: Any) -> Any:
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for part in losses:
            sums += part["loss"]
        torch.distributed.all_reduce(sums, group=self.context.pp_group)
        return {"loss": sums}

    def observe(self, losses: Any) -> None:
        pass


def architecture(args: argparse.Namespace, num_layers: int) -> Architecture:
    return Architecture(
        family="llama",
        num_layers=num_layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.hidden * 7 // 2,
        num_attention_heads=args.hidden // 128,
        num_query_groups=max(1, args.hidden // 512),
        head_dim=128,
        vocab_size=args.vocab,
        max_position_embeddings=args.seq_length,
        norm_epsilon=1e-5,
        rotary_base=500000.0,
    )


@torch.no_grad()
def build(
    shape: Architecture, context: ParallelContext, dtype: torch.dtype, recompute: str
) -> list[Any]:
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


def peak_memory(device: str) -> int:
    """Bytes; of the CPU's process since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
