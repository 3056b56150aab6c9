"""Checkpoints of NeMo 2, read and written without NeMo.

``DIR/context/model.yaml`` says what the model is, the tokenizer lies in ``DIR/context``, and
``DIR/weights`` is a ``torch_dist`` checkpoint with the names of the model under ``module.``,
beside the optimizer's state, which is not read. The pickles of the context are never opened. A
quantized model's quantizers lie in ``DIR/weights`` as in ``megatron:`` checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.checkpoint.base import Checkpoint, has_tokenizer, load_tokenizer
from slimtron_common.checkpoint.megatron import (
    WEIGHTS_DIR,
    WRAPPER,
    check_quantizers,
    load_distributed,
    write_weights,
)
from slimtron_common.checkpoint.metadata import StoredTensor, check_metadata
from slimtron_common.checkpoint.nemo2_context import write_context
from slimtron_common.checkpoint.writer import collective_directory, copy_files
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.integrations.megatron_core import save_common_state
from slimtron_common.integrations.modelopt_state import is_quantized, quantizer_settings
from slimtron_common.manifest import write_manifest
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.nemo import architecture_from_nemo
from slimtron_common.models.nemo_classes import nemo_model
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.unwrap import unwrap_chunks

__all__ = ["CONTEXT_DIR", "Nemo2Checkpoint", "save_nemo2", "write_nemo2"]

_EMBEDDING = f"{WRAPPER}embedding.word_embeddings.weight"
CONTEXT_DIR = "context"
_TOKENIZER = "nemo_tokenizer"


class Nemo2Checkpoint(Checkpoint):
    """A checkpoint that NeMo 2 wrote."""

    kind = "nemo2"
    config_name = f"{CONTEXT_DIR}/model.yaml"

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.weights = path / WEIGHTS_DIR
        super().__init__(path, trust_remote_code=trust_remote_code)
        rows = self._stored[_EMBEDDING].shape[0]
        if rows < self.architecture.vocab_size:
            raise CheckpointError(
                "the vocabulary is not that of the weights",
                where=path / self.config_name,
                found=self.architecture.vocab_size,
                allowed=f"at most {rows}",
            )
        self.is_quantized = check_quantizers(self.weights, self._stored)

    def _read_architecture(self) -> Architecture:
        path = self.path / self.config_name
        description = _read_description(path)
        config = description.get("config")
        named = config.get("vocab_size") if isinstance(config, dict) else None
        self._tokenizer_name = _tokenizer_name(description)
        if _EMBEDDING not in self._stored:
            raise CheckpointError(
                "the weights are not those of a NeMo 2 language model",
                where=self.weights,
                found=f"no {_EMBEDDING}",
            )
        return architecture_from_nemo(
            description,
            vocab_size=named or self._tokenizer_size(),
            source=str(path),
        )

    def _tokenizer_size(self) -> int:
        # The weights have more rows: NeMo pads them.
        return len(load_tokenizer(self.tokenizer_path, trust_remote_code=self.trust_remote_code))

    @property
    def tokenizer_path(self) -> Path:
        context = self.path / CONTEXT_DIR
        candidates = [context / _TOKENIZER, context]
        if self._tokenizer_name:
            # A path from outside the checkpoint would be another machine's.
            candidates.insert(0, context / Path(self._tokenizer_name).name)
        return next((path for path in candidates if has_tokenizer(path)), context)

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        return check_metadata(self.weights)

    @property
    def weight_bytes(self) -> int:
        return sum(
            stored.num_bytes for name, stored in self._stored.items() if name.startswith(WRAPPER)
        )

    def load(self, model: nn.Module, context: ParallelContext) -> None:
        load_distributed(model, self.weights, quantized=self.is_quantized)


def save_nemo2(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    companions: list[Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model as a NeMo 2 checkpoint; the arguments and errors of ``save_megatron``.

    NeMo 2.7.3 opens it as its own class of the family; NeMo need not be installed here.

    Raises:
        UnsupportedModelError: NeMo's class of the family cannot compute the model.
    """
    with collective_directory(path, context, overwrite=overwrite) as directory:
        write_nemo2(directory, model, architecture, context, dtype=dtype, companions=companions)


def write_nemo2(
    directory: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    companions: list[Path] | None = None,
    describe: Callable[[Path], None] | None = None,
) -> None:
    """Fills a directory as ``save_nemo2`` does; its arguments, and an existing directory.

    When it returns, every process can read the files.

    Args:
        directory: On storage that all processes share.
        model: As of ``save_nemo2``.
        architecture: As of ``save_nemo2``.
        context: As of ``save_nemo2``.
        dtype: As of ``save_nemo2``.
        companions: As of ``save_nemo2``.
        describe: Fills the directory ``context`` in one process, where NeMo itself can.
    """
    weights = directory / WEIGHTS_DIR
    objects = _empty_states(model, architecture, context)
    written = write_weights(weights, model, context, dtype=dtype, prefix=WRAPPER, objects=objects)
    if context.is_main:
        # Beside the optimizer's, there is no state that NeMo would need.
        save_common_state({}, weights)
        name = str(written).removeprefix("torch.")
        described = directory / CONTEXT_DIR
        described.mkdir()
        if describe is None:
            _describe(dataclasses.replace(architecture, dtype=name), described, companions or [])
        else:
            describe(described)
        write_manifest(directory, kind="nemo2", config={}, metrics={}, seed=None)
    context.barrier()


def _describe(architecture: Architecture, directory: Path, companions: list[Path]) -> None:
    tokenizer, vocab_size = directory / _TOKENIZER, architecture.vocab_size
    if companions:
        tokenizer.mkdir()
        copy_files(companions, tokenizer)
    is_complete = has_tokenizer(tokenizer)
    # Without its own, NeMo takes the tokenizer's and pads it as its tensor parallelism asks for.
    own = None if is_complete and len(load_tokenizer(tokenizer)) == vocab_size else vocab_size
    name = tokenizer.name if is_complete else None
    write_context(directory, nemo_model(architecture, tokenizer=name, vocab_size=own))


def _empty_states(
    model: nn.Module, architecture: Architecture, context: ParallelContext
) -> dict[str, Any]:
    """The extra states of Transformer Engine's layers, empty, but for those of quantized layers.

    NeMo has those layers on a GPU and insists on their states, which matter to FP8 training alone.
    """
    from megatron.core.dist_checkpointing import ShardedObject

    a = architecture
    dense = ["self_attention.linear_qkv", "self_attention.core_attention"]
    dense += ["self_attention.linear_proj"]
    if a.qk_norm:
        dense += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    projections = ["linear_fc1", "linear_fc2"]
    dense += ["pre_mlp_layernorm"] if a.moe else [f"mlp.{name}" for name in projections]
    replica = (0, context.tp_rank, context.dp_rank * context.cp_size + context.cp_rank)
    expert_replica = (0, context.tp_rank, context.expert_dp_rank)
    found = []
    taken: set[str] = set()
    chunks: list[Any] = unwrap_chunks(model)
    for chunk in chunks:
        if is_quantized(chunk):
            taken |= {state.unique_key for state in quantizer_settings(chunk).values()}
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            found += [
                ShardedObject(_extra(name), None, (a.num_layers,), (number,), replica)
                for name in dense
            ]
            found += [
                ShardedObject(
                    _extra(f"mlp.experts.experts.{name}"),
                    None,
                    (a.num_layers, a.moe.num_experts),
                    (number, expert),
                    expert_replica,
                )
                for name in projections
                for expert in getattr(layer.mlp, "local_expert_indices", ())
                if a.moe
            ]
        if chunk.post_process:
            name = "decoder.final_layernorm._extra_state"
            found.append(ShardedObject(name, None, (1,), (0,), replica))
    return {state.unique_key: state for state in found if state.unique_key not in taken}


def _extra(module: str) -> str:
    return f"decoder.layers.{module}._extra_state"


def _read_description(path: Path) -> dict[str, Any]:
    from slimtron_common.yaml_loader import load_yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the description of the model cannot be read: {error}",
            where=path,
            hint="give the directory that holds context/ and weights/",
        ) from error
    try:
        description = load_yaml(text, where=str(path))
    except ConfigError as error:
        raise CheckpointError(
            "the description of the model is not plain YAML", where=path, found=error
        ) from error
    if not isinstance(description, dict):
        raise CheckpointError(
            "the description of the model must be a mapping",
            where=path,
            found=type(description).__name__,
        )
    return description


def _tokenizer_name(description: dict[str, Any]) -> str | None:
    tokenizer = description.get("tokenizer")
    if not isinstance(tokenizer, dict):
        return None
    name = tokenizer.get("pretrained_model_name") or tokenizer.get("model_path")
    return name if isinstance(name, str) else None
