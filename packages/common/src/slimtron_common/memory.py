"""Refuse, before any weight loads, what will not fit into memory."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping

import psutil  # type: ignore[import-untyped]
import torch

from slimtron_common.checkpoint import Checkpoint
from slimtron_common.errors import ParallelismError
from slimtron_common.models import Architecture
from slimtron_common.parallel.config import ParallelConfig
from slimtron_common.parallel.context import (
    local_rank_from_environment,
    local_world_size_from_environment,
)

__all__ = [
    "activation_bytes",
    "available_memory",
    "check_memory",
    "layer_parameters",
    "peak_memory",
    "required_memory",
    "shard_parameters",
]


def shard_parameters(checkpoint: Checkpoint, parallel: ParallelConfig) -> float:
    """Parameters of the largest part of a model that one process holds."""
    architecture = checkpoint.architecture
    embedding = architecture.vocab_size * architecture.hidden_size
    # A stage with an embedding is the largest; a tied output layer is a second copy under PP.
    experts = architecture.num_expert_parameters
    shared = checkpoint.num_parameters - embedding - experts
    layers = shared + experts / parallel.expert_parallel_size
    share = architecture.stage_layers(parallel.pipeline_parallel_size)[0] / architecture.num_layers
    return (layers * share + embedding) / parallel.tensor_parallel_size


def layer_parameters(checkpoint: Checkpoint, parallel: ParallelConfig) -> float:
    """Parameters that one process holds where layers are loaded one at a time.

    These are a layer's, with the embedding or the output layer.
    """
    architecture = checkpoint.architecture
    embedding = architecture.vocab_size * architecture.hidden_size
    experts = architecture.num_expert_parameters
    ends = embedding * (1 if architecture.tied_embeddings else 2)
    layers = checkpoint.num_parameters - ends - experts + experts / parallel.expert_parallel_size
    layer = layers / architecture.num_layers
    return (layer + embedding) / parallel.tensor_parallel_size


def activation_bytes(
    architecture: Architecture,
    parallel: ParallelConfig,
    shapes: Iterable[tuple[int, int]],
    itemsize: int,
    *,
    experts_per_token: int | None = None,
) -> int:
    """Bytes of the largest of what a forward pass makes in one process, logits included.

    Args:
        architecture: The model.
        parallel: Its layout.
        shapes: Micro-batch size and sequence length of every kind of forward pass.
        itemsize: Bytes of a number that the model computes with.
        experts_per_token: Experts that a token is sent to; None for the model's own number.
    """
    a, tensor = architecture, parallel.tensor_parallel_size
    shared = a.moe.shared_ffn_hidden_size if a.moe else None
    routes = (
        (a.moe.experts_per_token if a.moe else 0)
        if experts_per_token is None
        else (experts_per_token)
    )
    return round(
        max(
            # Logits and their float32 copy, attention scores before and after softmax, and a few
            # copies of the widest hidden state.
            b * s * (a.vocab_size / tensor) * (itemsize + 4)
            + 3 * b * s * s * (a.num_attention_heads / tensor) * 4
            + 6 * b * s * (max(a.ffn_hidden_size, shared or 0) / tensor) * itemsize
            # An expert's input, the copies that bring it there, and its output.
            + 4 * b * s * routes * a.hidden_size * itemsize
            for b, s in shapes
        )
        / parallel.context_parallel_size
    )


def required_memory(parts: Iterable[float]) -> int:
    """Bytes of all parts together, with a tenth for what the libraries take."""
    return round(1.1 * sum(parts))


def available_memory(device: str) -> int:
    """Bytes that this process may take: of its GPU, or its share of the host's memory.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info(local_rank_from_environment())[0]
    available: int = psutil.virtual_memory().available
    return available // local_world_size_from_environment()


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most: on its GPU, or in the host's memory.

    The latter includes the libraries, and the pages of files that are mapped.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_memory(parts: Mapping[str, float], device: str, *, hint: str) -> None:
    """Refuses a job that one process has not the memory for.

    Args:
        parts: What a process holds at one time, in bytes, by name.
        device: Where it holds it: ``cpu`` or ``cuda``.
        hint: What the user should do.

    Raises:
        ParallelismError: The process may not take that much.
    """
    needed, available = required_memory(parts.values()), available_memory(device)
    if needed > available:
        listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        raise ParallelismError(
            "the model does not fit into the memory of one process",
            where="GPU" if device == "cuda" else "host",
            found=f"{needed / 2**30:.1f} GiB needed ({listed}), {available / 2**30:.1f} GiB free",
            hint=hint,
        )
