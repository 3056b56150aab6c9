"""A quantized checkpoint to train on, read back: the weights, and ModelOpt's quantizers on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.kinds import kind_of
from slimtron_common.errors import CheckpointError
from slimtron_common.models import Architecture
from slimtron_common.models.mapping import model_parameters
from slimtron_common.models.megatron import LayerSpec, build_model
from slimtron_common.parallel import ParallelContext
from slimtron_quant.formats.faults import find_faults
from slimtron_quant.formats.kv_cache import KvCacheFormat

__all__ = ["MegatronExport", "check_is_quantized"]


class MegatronExport:
    """A quantized model that trains on, of Megatron-Core or NeMo 2.

    Args:
        path: The directory.
        layer_spec: Modules to build the model from.

    Raises:
        CheckpointError: A file is missing or corrupt, or the model is not quantized.
    """

    def __init__(self, path: Path, *, layer_spec: LayerSpec = "auto") -> None:
        self.path = path
        self.checkpoint = open_checkpoint(f"{kind_of(path)}:{path}")
        check_is_quantized(self.checkpoint)
        self.architecture: Architecture = self.checkpoint.architecture
        self._layer_spec = layer_spec
        self._sizes = {
            name: torch.Size(shape).numel()
            for _, rule in model_parameters(self.architecture)
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer's files."""
        return self.checkpoint.tokenizer_path

    @property
    def kv_cache(self) -> KvCacheFormat | None:
        """None: a cache's quantizers are not written to these checkpoints."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.checkpoint.dtype

    @property
    def weight_bytes(self) -> int:
        """Size of the distributed checkpoint."""
        return self.checkpoint.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all parameters."""
        return 8.0 * self.weight_bytes / self.checkpoint.num_parameters

    def stored_bits(self, name: str) -> int:
        """Returns what a tensor takes on disk by its Hugging Face name, quantized or not."""
        return 8 * self.checkpoint.dtype.itemsize * self._sizes[name]

    def describe(self) -> str:
        """Returns in a line what is stored how."""
        kind = {"megatron": "Megatron", "nemo2": "NeMo 2"}[self.checkpoint.kind]
        return f"{kind} checkpoint of {self.checkpoint.dtype} weights with quantizers".replace(
            "torch.", ""
        )

    def check_values(self) -> None:
        """Does nothing: a distributed checkpoint is checked as ``build`` loads it."""

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Type to run the model in: as stored on a GPU, float32 on the CPU."""
        return self.checkpoint.compute_dtype("auto", device.type)

    def build(self, context: ParallelContext, *, dtype: torch.dtype) -> nn.Module:
        """Builds the model with live quantizers.

        Raises:
            CheckpointError: Something is missing or left over, or a value is not finite.
        """
        model = build_model(self.architecture, context, dtype=dtype, layer_spec=self._layer_spec)
        self.checkpoint.load(model, context)
        faults = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
        faults = [f"{name} is not finite" for name in faults] + find_faults(model)
        if faults:
            raise CheckpointError("a weight or scale is unusable", where=self.path, found=faults[0])
        return model


def check_is_quantized(checkpoint: Any) -> None:
    """Refuses a checkpoint without quantizers.

    Raises:
        CheckpointError: It has none.
    """
    if not checkpoint.is_quantized:
        raise CheckpointError(
            "the model is not quantized",
            where=checkpoint.path,
            hint="slimtron-quant run --export-format megatron writes one that is",
        )
