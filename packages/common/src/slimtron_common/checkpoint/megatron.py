"""Megatron distributed checkpoints, with what rebuilds the model beside the weights.

``DIR/config.json`` says what the model is in Hugging Face's terms, the tokenizer's files lie
next to it, and ``DIR/weights`` is a checkpoint of ``megatron.core.dist_checkpointing``
(``torch_dist``), which opens at any tensor and pipeline size. That of a quantized model holds
ModelOpt's quantizers, too, and gives them to the model that it is loaded into.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from slimtron_common.checkpoint.base import CONFIG_NAME, Checkpoint
from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.checkpoint.metadata import check_metadata, refuse_code
from slimtron_common.checkpoint.slices import SliceReader
from slimtron_common.checkpoint.writer import collective_directory, copy_files
from slimtron_common.errors import CheckpointError
from slimtron_common.integrations.megatron_core import COMMON_STATE, load_sharded, prefixed
from slimtron_common.integrations.modelopt_state import (
    STATE_DIR,
    cut_gated_scales,
    is_quantized,
    quantizer_settings,
    quiet_modelopt,
    restore_quantizers,
    write_modelopt_state,
)
from slimtron_common.integrations.modelopt_weights import weights_are_bytes
from slimtron_common.manifest import write_manifest
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.huggingface import config_from_architecture
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.unwrap import unwrap_chunks, unwrap_model

__all__ = [
    "WRAPPER",
    "MegatronCheckpoint",
    "check_quantizers",
    "load_distributed",
    "save_megatron",
    "write_megatron",
    "write_weights",
]

WEIGHTS_DIR = "weights"
WRAPPER = "module."
"""What the names of the weights start with in NeMo's checkpoints."""

_EMBEDDING = "embedding.word_embeddings.weight"


class MegatronCheckpoint(Checkpoint):
    """A Megatron distributed checkpoint that Slimtron wrote."""

    kind = "megatron"

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(path, trust_remote_code=trust_remote_code)
        self.weights = path / WEIGHTS_DIR
        if not (self.weights / "metadata.json").is_file():
            raise CheckpointError(
                "the weights are missing or were not written to their end",
                where=self.weights,
                found="no metadata.json",
                hint="save the checkpoint again",
            )
        stored = check_metadata(self.weights)
        rows = stored[_EMBEDDING].shape[0] if _EMBEDDING in stored else 0
        # Megatron-Core pads the embedding and would fill up a shorter one without a word.
        if rows < self.architecture.vocab_size:
            raise CheckpointError(
                "the vocabulary is not that of the weights",
                where=path / CONFIG_NAME,
                found=self.architecture.vocab_size,
                allowed=f"at most {rows}",
            )
        self.is_quantized = check_quantizers(self.weights, stored)

    @property
    def weights_are_bytes(self) -> bool:
        return self.is_quantized and weights_are_bytes(self.weights)

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weights.rglob("*") if file.is_file())

    def load(self, model: nn.Module, context: ParallelContext) -> None:
        load_distributed(model, self.weights, quantized=self.is_quantized)


def check_quantizers(weights: Path, names: Iterable[str]) -> bool:
    """Tells whether a distributed checkpoint holds ModelOpt's quantizers.

    Args:
        weights: The distributed checkpoint.
        names: Of its tensors.

    Raises:
        CheckpointError: It holds their scales and not what they belong to.
    """
    state = weights / STATE_DIR
    found = state.is_dir() or any("_quantizer." in name for name in names)
    if found and not (state / COMMON_STATE).is_file():
        raise CheckpointError(
            "the checkpoint holds scales of quantizers, and what they belong to is missing",
            where=state / COMMON_STATE,
            hint="copy the folder along with the weights",
        )
    return found


def load_distributed(model: nn.Module, directory: Path, *, quantized: bool = False) -> None:
    """Fills this process's part of a model from a checkpoint of Megatron's at any layout.

    Reads no more than the model's weights.

    Args:
        model: A Megatron-Core model or what holds it.
        directory: A checkpoint of ``megatron.core.dist_checkpointing`` (``torch_dist``). Its
            names may start with ``module.``, as NeMo's do.
        quantized: Whether ModelOpt's quantizers are beside the weights, to be restored.

    Raises:
        CheckpointError: The weights are damaged, or not those of this model.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException

    model = unwrap_model(model)
    is_wrapped = any(name.startswith(WRAPPER) for name in check_metadata(directory))
    prefix = WRAPPER if is_wrapped else ""
    try:
        with refuse_code(), warnings.catch_warnings():
            # Megatron-Core reads by functions that torch is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            if quantized and not is_quantized(model):
                restore_quantizers(model, directory, prefix)
            state = load_sharded(
                _sharded_weights(model),
                directory,
                prefix,
                reader=SliceReader() if _is_lone_layer(model) else None,
            )
    except (
        CheckpointingException,
        CheckpointException,
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            "the weights are damaged or not those of this model",
            where=directory,
            found=str(error).strip().rpartition("\n")[2],
        ) from error
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
    if lost:
        raise CheckpointError(
            "the checkpoint does not match the model", where=directory, found=lost[:3]
        )


def save_megatron(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    companions: list[Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model as a Megatron distributed checkpoint, its quantizers included.

    All processes call it. The directory appears whole or not at all. Megatron-Core's writers
    are separate processes, so a script that calls this needs ``if __name__ == "__main__"``.

    Args:
        path: The directory to create.
        model: A Megatron-Core model or what holds it, at any tensor and pipeline size.
        architecture: What it is.
        context: This process's place.
        dtype: Type of the weights to write; the model's own without it. The scales of quantizers
            keep theirs.
        companions: Tokenizer files to copy along.
        overwrite: Whether an existing directory is replaced.

    Raises:
        CheckpointError: The directory exists or cannot be written.
    """
    with collective_directory(path, context, overwrite=overwrite) as directory:
        write_megatron(directory, model, architecture, context, dtype=dtype, companions=companions)


def write_megatron(
    directory: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    companions: list[Path] | None = None,
) -> None:
    """Fills a directory as ``save_megatron`` does; its arguments, and an existing directory.

    When it returns, every process can read the files.
    """
    written = write_weights(directory / WEIGHTS_DIR, model, context, dtype=dtype)
    if context.is_main:
        name = str(written).removeprefix("torch.")
        write_json(directory / CONFIG_NAME, config_from_architecture(architecture, dtype=name))
        copy_files(companions or [], directory)
        write_manifest(directory, kind="megatron", config={}, metrics={}, seed=None)
    context.barrier()


def write_weights(
    weights: Path,
    model: nn.Module,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    prefix: str = "",
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> torch.dtype:
    """Writes a distributed checkpoint of a model's weights and quantizers.

    Args:
        weights: The directory to create.
        model: A Megatron-Core model or what holds it.
        context: This process's place.
        dtype: Type of the weights to write; the model's own without it.
        prefix: What all names start with.
        objects: Sharded objects to write besides, by any names.

    Returns:
        The type that was written.
    """
    from megatron.core import dist_checkpointing

    if context.is_main:
        weights.mkdir()
    context.barrier()
    chunks = unwrap_chunks(model)
    written: torch.dtype = dtype or next(chunks[0].parameters()).dtype
    sharded: dict[Any, Any] = {
        (index, name): tensor
        for index, chunk in enumerate(chunks)
        for name, tensor in _in_type(
            _sharded_weights(chunk), dict(chunk.named_parameters()), dtype
        ).items()
    }
    sharded |= {(None, name): value for name, value in objects.items()}
    quantized = is_quantized(chunks[0])
    if quantized:
        sharded |= {(0, name): value for name, value in quantizer_settings(chunks[0]).items()}
    dist_checkpointing.save(prefixed(sharded, prefix), str(weights))
    if quantized and context.is_main:
        write_modelopt_state(chunks[0], weights)
    return written


def _sharded_weights(model: Any) -> dict[str, Any]:
    with quiet_modelopt():
        sharded = model.sharded_state_dict(prefix="")
    # Transformer Engine's extra state holds FP8 training recipes, which weights do not need.
    sharded = {name: value for name, value in sharded.items() if "_extra_state" not in name}
    if _is_lone_layer(model):
        # Megatron-Core names it by its number in the whole model.
        number = model.decoder.layers[0].layer_number - 1
        found, local = f"decoder.layers.{number}.", "decoder.layers.0."
        sharded = {name.replace(found, local, 1): value for name, value in sharded.items()}
    return cut_gated_scales(model, sharded) if is_quantized(model) else sharded


def _is_lone_layer(model: Any) -> bool:
    """Whether a model is one layer of several, without a pipeline that has the others."""
    config, held = model.config, len(model.decoder.layers)
    return bool(config.pipeline_model_parallel_size == 1 and held < config.num_layers)


def _in_type(
    sharded: dict[str, Any], parameters: dict[str, nn.Parameter], dtype: torch.dtype | None
) -> dict[str, Any]:
    for name in sharded.keys() & parameters.keys():
        item = sharded[name]
        # Without a type each keeps its own: Megatron-Core has some of a Mamba layer in float32.
        item.data = item.data.detach().to(dtype or item.data.dtype)
        if hasattr(item, "dtype"):
            # What builds several tensors out of one asks that one.
            item.dtype = item.data.dtype
    return sharded
