"""Hugging Face directories: config.json, safetensors and tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from slimtron_common.checkpoint.base import CONFIG_NAME, Checkpoint, read_json
from slimtron_common.checkpoint.weights import load_weights, whole_tensors
from slimtron_common.checkpoint.writer import (
    INDEX_NAME,
    SINGLE_NAME,
    collective_directory,
    copy_files,
    write_safetensors,
)
from slimtron_common.errors import CheckpointError
from slimtron_common.manifest import write_manifest
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.families import FAMILIES
from slimtron_common.models.huggingface import config_from_architecture
from slimtron_common.models.mapping import model_parameters
from slimtron_common.parallel.context import ParallelContext

__all__ = [
    "HuggingFaceCheckpoint",
    "SafetensorsDirectory",
    "save_huggingface",
    "write_huggingface",
]


class SafetensorsDirectory:
    """The tensors of a directory's safetensors files, read one at a time.

    Args:
        path: The directory.
        aliases: Names that a tensor may be stored under, and the name that it goes by.

    Raises:
        CheckpointError: No safetensors file, a corrupt one, or an index that does not match.
    """

    def __init__(self, path: Path, aliases: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path = path
        stored = self._locate()
        self._stored_name = {aliases.get(name, name): name for name in stored}
        self._file_of = {aliases.get(name, name): file for name, file in stored.items()}
        # safetensors ships no types.
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the files' order."""
        return list(self._file_of)

    @cached_property
    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Each tensor's safetensors type and shape, read without its data."""
        found = {}
        for name in self._file_of:
            piece = self._handle(name).get_slice(self._stored_name[name])
            found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
        return found

    @property
    def weight_bytes(self) -> int:
        """Size of the safetensors files."""
        return sum((self.path / name).stat().st_size for name in set(self._file_of.values()))

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor on the CPU.

        Raises:
            CheckpointError: It is not there or cannot be read.
        """
        if name not in self._file_of:
            raise CheckpointError("a tensor is missing", where=self.path, found=name)
        try:
            tensor: torch.Tensor = self._handle(name).get_tensor(self._stored_name[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name} cannot be read: {error}", where=self.path / self._file_of[name]
            ) from error
        return tensor

    def close(self) -> None:
        """Unmaps the files."""
        self._open.clear()

    def _locate(self) -> dict[str, str]:
        index = self.path / INDEX_NAME
        weight_map = None
        # Some directories hold the weights twice; this is the order in which transformers looks.
        if (self.path / SINGLE_NAME).is_file():
            files = [SINGLE_NAME]
        elif index.is_file():
            weight_map = _read_weight_map(index)
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(p.name for p in self.path.glob("*.safetensors"))
        if not files:
            pickles = [p.name for p in self.path.glob("*.bin")]
            raise CheckpointError(
                "no safetensors file",
                where=self.path,
                found=", ".join(pickles) or "none",
                hint="pickled weights could run code and are not opened: save the model with "
                "transformers' save_pretrained, which writes safetensors"
                if pickles
                else "is this the model's directory?",
            )
        located: dict[str, str] = {}
        for file in files:
            try:
                with safe_open(self.path / file, framework="pt") as handle:
                    located.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"the file is missing, cut short or not a safetensors file: {error}",
                    where=self.path / file,
                    hint="copy or download it again",
                ) from error
        if weight_map is not None and weight_map != located:
            wrong = sorted(set(weight_map.items()) ^ set(located.items()))
            raise CheckpointError(
                "the index and the files disagree", where=index, found=wrong[0][0]
            )
        return located

    def _handle(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file]


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=index)
    for name, file in weight_map.items():
        # A path could lead out of the directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"the index names no file beside it for {name}", where=index, found=repr(file)
            )
    return weight_map


class HuggingFaceCheckpoint(Checkpoint):
    """A Hugging Face directory, its headers checked against its config on opening."""

    kind = "hf"

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(path, trust_remote_code=trust_remote_code)
        family = FAMILIES[self.architecture.family]
        aliases = {}
        if family.embedding_alias is not None:
            aliases[f"{family.embedding_alias}.weight"] = f"{family.embedding}.weight"
        self.tensors = SafetensorsDirectory(path, aliases)
        self._check_headers()

    @property
    def weight_bytes(self) -> int:
        return self.tensors.weight_bytes

    def load(self, model: nn.Module, context: ParallelContext) -> None:
        load_weights(model, self.architecture, context, self.tensors.read)
        self.tensors.close()

    def _check_headers(self) -> None:
        expected = {
            name: shape
            for _, rule in model_parameters(self.architecture)
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }
        headers = self.tensors.headers
        for name, shape in expected.items():
            if name not in headers:
                raise CheckpointError(
                    "a tensor that config.json promises is missing",
                    where=self.path,
                    found=f"no {name}",
                )
            dtype, found = headers[name]
            if found != shape:
                raise CheckpointError(
                    f"{name} has another shape than config.json says",
                    where=self.path,
                    found=list(found),
                    allowed=list(shape),
                )
            if dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(
                    f"{name} is stored in a type that is no weight's",
                    where=self.path,
                    found=dtype,
                    allowed="F32, F16, BF16",
                )
        # A tied model may repeat its embedding; rotary tables are recomputed.
        unknown = [
            name
            for name in headers
            if name not in expected and name != "lm_head.weight" and "rotary_emb" not in name
        ]
        if unknown:
            raise CheckpointError(
                "the files hold tensors that the architecture does not have; opening the model "
                "without them would change it",
                where=self.path,
                found=", ".join(unknown[:3]),
            )


def save_huggingface(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    companions: list[Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model, at any tensor and pipeline size, as a Hugging Face directory.

    All processes call it. The directory appears whole or not at all.

    Args:
        path: The directory to create.
        model: A Megatron-Core model or what holds it.
        architecture: What it is.
        context: This process's place.
        dtype: Type to write; the model's own without it.
        companions: Tokenizer files to copy along.
        overwrite: Whether an existing directory is replaced.

    Raises:
        CheckpointError: The directory exists or cannot be written.
    """
    with collective_directory(path, context, overwrite=overwrite) as directory:
        write_huggingface(
            directory, model, architecture, context, dtype=dtype, companions=companions
        )


def write_huggingface(
    directory: Path,
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    dtype: torch.dtype | None = None,
    companions: list[Path] | None = None,
) -> None:
    """Fills a directory as ``save_huggingface`` does; its arguments, and an existing directory.

    When it returns, every process can read the files.
    """
    written = dtype or next(model.parameters()).dtype
    tensors = (
        (name, tensor if dtype is None else tensor.to(dtype))
        for name, tensor in whole_tensors(model, architecture, context)
    )
    write_safetensors(directory, tensors, context)
    if context.is_main:
        config = config_from_architecture(architecture, dtype=str(written).removeprefix("torch."))
        write_json(directory / CONFIG_NAME, config)
        copy_files(companions or [], directory)
        write_manifest(directory, kind="hf", config={}, metrics={}, seed=None)
    context.barrier()


def write_json(path: Path, data: object) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
