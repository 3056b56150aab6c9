"""What a checkpoint is, told from its headers: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from slimtron_common.checkpoint.base import (
    CONFIG_NAME,
    has_tokenizer,
    open_checkpoint,
    parse_spec,
    read_json,
)
from slimtron_common.checkpoint.huggingface import HuggingFaceCheckpoint, SafetensorsDirectory
from slimtron_common.manifest import MANIFEST_NAME, Manifest, read_manifest
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.counting import count_parameters
from slimtron_common.models.huggingface import architecture_from_config

__all__ = ["Inspection", "inspect_checkpoint"]

_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}
"""safetensors' names of types and torch's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A checkpoint, described."""

    kind: str
    path: str
    architecture: Architecture
    parameters: dict[str, int]
    """Parameters of the model by component: embedding, attention, mlp (or router and experts),
    norms, output."""

    weight_bytes: int
    """Bytes that the weights take on disk."""

    dtypes: dict[str, int]
    """Stored numbers by torch's name of their type."""

    quantization: Mapping[str, Any] | None
    """``quantization_config`` of a model that is quantized already."""

    tokenizer: bool
    """Whether a tokenizer lies beside the weights."""

    tensor_parallel_sizes: list[int]
    pipeline_parallel_sizes: list[int]
    expert_parallel_sizes: list[int]
    manifest: Manifest | None
    """What Slimtron noted when it wrote the directory."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, a tied output layer counted once."""
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "num_parameters": self.num_parameters}


def inspect_checkpoint(spec: str) -> Inspection:
    """Describes a checkpoint and checks its headers against its config.

    A quantized Hugging Face directory is described too, though nothing else opens it.

    Args:
        spec: ``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``.

    Raises:
        ConfigError: ``spec`` is malformed.
        CheckpointError: The directory is missing, incomplete or corrupt.
        UnsupportedModelError: The architecture is unknown.
    """
    kind, path = parse_spec(spec, where="KIND:DIR")
    config = read_json(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else {}
    quantization = config.pop("quantization_config", None) if kind == "hf" else None
    if quantization:
        architecture = architecture_from_config(config, source=str(path / CONFIG_NAME))
        tensors = SafetensorsDirectory(path)
        weight_bytes, dtypes = tensors.weight_bytes, _count_types(tensors)
        tokenizer_path = path
    else:
        checkpoint = open_checkpoint(spec, where="KIND:DIR")
        architecture, weight_bytes = checkpoint.architecture, checkpoint.weight_bytes
        tokenizer_path = checkpoint.tokenizer_path
        dtypes = (
            _count_types(checkpoint.tensors)
            if isinstance(checkpoint, HuggingFaceCheckpoint)
            else {architecture.dtype: checkpoint.num_parameters}
        )
    return Inspection(
        kind=kind,
        path=str(path),
        architecture=architecture,
        parameters=count_parameters(architecture),
        weight_bytes=weight_bytes,
        dtypes=dtypes,
        quantization=quantization,
        tokenizer=has_tokenizer(tokenizer_path),
        tensor_parallel_sizes=architecture.tensor_parallel_sizes,
        pipeline_parallel_sizes=architecture.pipeline_parallel_sizes,
        expert_parallel_sizes=architecture.expert_parallel_sizes,
        manifest=read_manifest(path) if (path / MANIFEST_NAME).is_file() else None,
    )


def _count_types(tensors: SafetensorsDirectory) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for dtype, shape in tensors.headers.values():
        counts[_TYPES.get(dtype, dtype)] += torch.Size(shape).numel()
    return dict(counts.most_common())
