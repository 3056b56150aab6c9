"""What one process holds in memory while it trains."""

from __future__ import annotations

import torch

from slimtron_common.checkpoint import Checkpoint
from slimtron_common.memory import shard_parameters
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import transformer_engine_available
from slimtron_distill.job.config import DistillJobConfig

__all__ = ["training_memory"]


def training_memory(
    config: DistillJobConfig,
    student: Checkpoint,
    teacher: Checkpoint | None,
    *,
    dtype: torch.dtype,
    device: str,
    data_parallel_size: int,
) -> dict[str, float]:
    """Bytes of each part of a training, in the process that holds most.

    Args:
        config: The job.
        student: The student.
        teacher: The teacher that runs along; None where its logits come from a cache.
        dtype: Type that both compute in.
        device: ``cpu`` or ``cuda``.
        data_parallel_size: Processes that share the optimizer's state.

    Returns:
        Bytes by the name of the part.
    """
    trained = shard_parameters(student, config.parallel)
    # fp32 weights beside those of another type, and two moments; a process has its share.
    optimizer = (8 if dtype is torch.float32 else 12) * trained / data_parallel_size
    tokens = config.training.micro_batch_size * config.training.seq_length
    columns = student.architecture.vocab_size / config.parallel.tensor_parallel_size
    logits = 2.0 * tokens * columns * dtype.itemsize
    if teacher is not None and config.distillation.skip_lm_loss:
        # The student's become their gradient.
        logits = min(logits, config.training.logit_bytes)
    else:
        # And the student's gradient, and a float32 copy for the loss.
        logits += tokens * columns * (dtype.itemsize + 4)
    flash = device == "cuda" and config.layer_spec != "local" and transformer_engine_available()
    return {
        "student": trained * dtype.itemsize,
        "gradients": trained * 4.0,
        "optimizer": optimizer,
        "teacher": _teacher(teacher, config, dtype) if teacher else 0.0,
        "logits": logits,
        "activations": _activations(config, student.architecture, dtype, flash=flash)
        + (_layer(config, teacher.architecture, dtype, scores=not flash) if teacher else 0.0),
    }


def _teacher(teacher: Checkpoint, config: DistillJobConfig, dtype: torch.dtype) -> float:
    parameters = shard_parameters(teacher, config.parallel)
    if not teacher.weights_are_bytes:
        return parameters * dtype.itemsize
    a = teacher.architecture
    whole = a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
    # Embedding and output layer are not quantized.
    return parameters + whole / config.parallel.tensor_parallel_size * (dtype.itemsize - 1)


def _activations(
    config: DistillJobConfig, architecture: Architecture, dtype: torch.dtype, *, flash: bool
) -> float:
    """What the backward pass needs of the micro-batches that are under way in a pipeline."""
    recompute = config.training.recompute
    # The first stage holds as many micro-batches as there are stages; its share of the layers is
    # one in as many.
    layers = float(architecture.num_layers)
    scores = not flash and recompute != "selective"
    if recompute == "full":
        tokens = config.training.micro_batch_size * config.training.seq_length
        inputs = layers * tokens * architecture.hidden_size * dtype.itemsize
        return inputs + _layer(config, architecture, dtype, scores=not flash)
    return layers * _layer(config, architecture, dtype, scores=scores)


def _layer(
    config: DistillJobConfig, architecture: Architecture, dtype: torch.dtype, *, scores: bool
) -> float:
    """Activations of one layer for one micro-batch (after Korthikanti et al. 2022, section 4.1)."""
    batch, length = config.training.micro_batch_size, config.training.seq_length
    tensor, h = config.parallel.tensor_parallel_size, architecture.hidden_size
    heads = architecture.num_attention_heads * architecture.head_dim
    ffn = architecture.ffn_hidden_size * (4 if architecture.gated else 2)
    if architecture.moe:
        ffn *= architecture.moe.experts_per_token
    norms = 4 * h / (tensor if config.parallel.sequence_parallel else 1)
    per_token = norms + (2 * h + 4 * heads + ffn) / tensor
    if scores:
        # Before and after the softmax, which is in float32.
        scores_per_token = 2 * architecture.num_attention_heads * length / tensor
        per_token += scores_per_token * 4 / dtype.itemsize
    return batch * length * per_token * dtype.itemsize
