"""The original's weights as named tensors, whatever kind of checkpoint holds them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimtron_common.checkpoint.huggingface import HuggingFaceCheckpoint, SafetensorsDirectory
from slimtron_common.checkpoint.weights import whole_tensors
from slimtron_common.checkpoint.writer import write_safetensors
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext
from slimtron_common.progress import stage
from slimtron_common.workdir import WorkDir
from slimtron_prune.job.opening import OpenModel

__all__ = ["load_model", "tensor_reader"]


def load_model(
    model: OpenModel, context: ParallelContext, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Loads a job's model in the job's layout.

    Args:
        model: The model.
        context: This process's place.
        dtype: Type of the parameters; the one to compute in without it.
    """
    with stage("load the model"):
        loaded = build_model(
            model.architecture,
            context,
            dtype=dtype or model.dtype,
            layer_spec=model.config.layer_spec,
        )
        model.checkpoint.load(loaded, context)
    return loaded


def tensor_reader(
    model: OpenModel, context: ParallelContext, work: WorkDir
) -> Callable[[str], Tensor]:
    """Returns what reads one tensor by its Hugging Face name, on every process.

    Tensors of a Megatron checkpoint are written by their names first, as stage ``source``.
    """
    if isinstance(model.checkpoint, HuggingFaceCheckpoint):
        return model.checkpoint.tensors.read
    if not work.has("source"):
        loaded = load_model(model, context, dtype=model.checkpoint.dtype)
        with stage("name the tensors"), work.stage("source") as output:
            tensors = whole_tensors(loaded, model.architecture, context)
            write_safetensors(output.directory, tensors, context)
    return SafetensorsDirectory(work.directory("source")).read
