r"""Train a quantized model on with its quantizers in place (quantization-aware training).

    slimtron-quant run --model hf:MODEL --recipe int4 --block-size auto --data pydoc \
        --export-format megatron --out QUANTIZED
    python examples/quantize/qat.py QUANTIZED TRAINED --data pydoc --steps 20
    slimtron-quant export megatron:TRAINED --out SERVED

One process, torch's AdamW and Megatron's own schedule: small enough to read, and for a CPU. In a
training script of your own, what ``open_checkpoint(...).load`` returns is a Megatron-Core model as
any other; wrap it in Megatron's ``DistributedDataParallel`` and optimizer afterwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from slimtron_common.checkpoint import open_checkpoint, save_megatron
from slimtron_common.data import token_dataset
from slimtron_common.data.config import DataConfig
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel


def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    losses = model(inputs, positions, None, labels=labels.contiguous())

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.item()}

    return losses, mean


def train(model: Any, batches: list[torch.Tensor], *, steps: int, lr: float) -> list[float]:
    """Trains on the batches in turn and returns the loss of every step."""
    # Checkpoints open for inference. Weights train; scales stay as calibrated.
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    run_schedule = get_forward_backward_func()
    history = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        [result] = run_schedule(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=batch.shape[1] - 1,
            micro_batch_size=len(batch),
            forward_only=False,
        )
        optimizer.step()
        history.append(result["loss"])
    return history


def main() -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", type=Path, help="a quantized Megatron checkpoint")
    parser.add_argument("trained", type=Path, help="the one to write")
    parser.add_argument("--data", default="pydoc", help="text, as for `slimtron-quant run`")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--num-batches", type=int, default=8, help="of text, again and again")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args()

    checkpoint = open_checkpoint(f"megatron:{args.quantized}")
    data = DataConfig(
        source=args.data,
        num_tokens=args.num_batches * args.batch_size * args.seq_length,
        seq_length=args.seq_length,
        micro_batch_size=args.batch_size,
    )
    dataset = token_dataset(data, checkpoint.tokenizer())
    with initialize_parallel(device=args.device) as context:
        batches = [batch.to(context.device) for batch in dataset.batches(args.batch_size)]
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        history = train(model, batches, steps=args.steps, lr=args.lr)
        print(f"loss {history[0]:.4f}, after {len(history)} steps {history[-1]:.4f}")
        save_megatron(
            args.trained,
            model,
            checkpoint.architecture,
            context,
            dtype=checkpoint.dtype,
            companions=checkpoint.companion_files(),
        )
    return history


# Megatron-Core writes checkpoints in processes of their own, which import this file.
if __name__ == "__main__":
    main()
