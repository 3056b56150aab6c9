"""The kinds of export: how each is written and read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from slimtron_common.checkpoint.kinds import kind_of
from slimtron_common.checkpoint.megatron import write_megatron
from slimtron_common.checkpoint.nemo2 import write_nemo2
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import LayerSpec
from slimtron_common.parallel import ParallelContext
from slimtron_common.parallel.schedule import LayeredModel
from slimtron_quant.export.huggingface import write_huggingface
from slimtron_quant.export.megatron import MegatronExport
from slimtron_quant.export.prepare import prepare_for_export
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.formats.kv_cache import KvCacheFormat

__all__ = ["Export", "open_export", "write_export"]


class Export(Protocol):
    """A written model, opened from its files."""

    path: Path
    architecture: Architecture

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer's files."""

    @property
    def kv_cache(self) -> KvCacheFormat | None:
        """Format of the KV cache; None for one that is not quantized."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that are not quantized."""

    @property
    def weight_bytes(self) -> int:
        """Size of the files that hold the weights."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all parameters."""

    def stored_bits(self, name: str) -> int:
        """Returns what a tensor takes on disk by its Hugging Face name, scales included."""

    def describe(self) -> str:
        """Returns in a line what is stored how."""

    def check_values(self) -> None:
        """Checks every tensor that is on disk."""

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Type to run the model in."""

    def build(self, context: ParallelContext, *, dtype: torch.dtype) -> nn.Module:
        """Builds the model that the files describe."""


def write_export(
    kind: str,
    directory: Path,
    model: nn.Module | LayeredModel,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    companions: Sequence[Path] = (),
    describe: Callable[[Path], None] | None = None,
) -> None:
    """Fills an existing directory; every process calls it.

    Args:
        kind: ``hf``, ``megatron`` or ``nemo``.
        directory: On storage that all processes share.
        model: The bare Megatron-Core model with calibrated quantizers; it is made the one on
            disk first (``prepare_for_export``). Or one in layers, which come prepared, for ``hf``.
        architecture: What it is.
        context: This process's place.
        dtype: Type of what stays unquantized.
        companions: Tokenizer files to copy along.
        describe: For ``nemo``, what fills ``context`` where NeMo itself can.

    Raises:
        UnsupportedModelError: A layer's quantizers have no format on disk.
    """
    if not isinstance(model, LayeredModel):
        prepare_for_export(model, architecture, dtype=dtype, packs=kind == "hf")
    if kind == "hf":
        write_huggingface(
            directory, model, architecture, context, dtype=dtype, companions=companions
        )
        return
    assert not isinstance(model, LayeredModel), "is written from a whole model"
    if kind == "megatron":
        write_megatron(
            directory, model, architecture, context, dtype=dtype, companions=list(companions)
        )
    else:
        write_nemo2(
            directory,
            model,
            architecture,
            context,
            dtype=dtype,
            companions=list(companions),
            describe=describe,
        )


def open_export(directory: Path, *, layer_spec: LayerSpec = "auto") -> Export:
    """Opens what ``write_export`` wrote.

    Args:
        directory: A Hugging Face directory, or a checkpoint of Megatron-Core or NeMo 2.
        layer_spec: Modules to build the latter from.

    Raises:
        CheckpointError: A file is missing, corrupt, or contradicts another.
        UnsupportedModelError: The architecture or format is unknown.
    """
    if kind_of(directory) == "hf":
        return ExportedModel(directory)
    return MegatronExport(directory, layer_spec=layer_spec)
