"""The interface of a checkpoint on disk."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.config import fingerprint, to_dict
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.huggingface import architecture_from_config
from slimtron_common.models.mapping import model_parameters
from slimtron_common.parallel.context import ParallelContext

__all__ = [
    "CONFIG_NAME",
    "KINDS",
    "TOKENIZER_FILES",
    "Checkpoint",
    "has_tokenizer",
    "load_tokenizer",
    "open_checkpoint",
    "parse_spec",
    "read_json",
]

CONFIG_NAME = "config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel unchanged from a model to what is made of it."""

_WEIGHT_SUFFIXES = (".safetensors", ".distcp")
_SAMPLES, _SAMPLE_BYTES = 16, 2**16

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

KINDS = ("hf", "megatron", "nemo2")


def parse_spec(
    spec: str, *, where: str = "model", kinds: Sequence[str] = KINDS
) -> tuple[str, Path]:
    """Splits ``hf:DIR`` into its kind and path.

    Args:
        spec: What to split.
        where: The config field that it came from, for messages.
        kinds: The kinds that can be meant.

    Raises:
        ConfigError: The kind is missing or unknown.
    """
    kind, colon, path = spec.partition(":")
    if not colon or kind not in kinds or not path:
        raise ConfigError(
            "say the kind of the checkpoint and its directory",
            where=where,
            found=spec,
            allowed=" or ".join(f"{kind}:DIR" for kind in kinds),
        )
    return kind, Path(path).expanduser()


def open_checkpoint(
    spec: str, *, where: str = "model", trust_remote_code: bool = False
) -> Checkpoint:
    """Opens a checkpoint and reads what it is, without its weights.

    Args:
        spec: ``hf:DIR`` (a Hugging Face directory with safetensors), ``megatron:DIR`` (a
            Megatron distributed checkpoint that Slimtron wrote) or ``nemo2:DIR`` (a checkpoint
            of NeMo 2, which need not be installed).
        where: The config field that ``spec`` came from, for messages.
        trust_remote_code: Whether the tokenizer may run code that comes with the model.

    Raises:
        ConfigError: ``spec`` is malformed.
        CheckpointError: The directory is missing, incomplete or corrupt.
        UnsupportedModelError: The architecture cannot be opened.
    """
    from slimtron_common.checkpoint.huggingface import HuggingFaceCheckpoint
    from slimtron_common.checkpoint.megatron import MegatronCheckpoint
    from slimtron_common.checkpoint.nemo2 import Nemo2Checkpoint

    kind, path = parse_spec(spec, where=where)
    openers: dict[str, type[Checkpoint]] = {
        "hf": HuggingFaceCheckpoint,
        "megatron": MegatronCheckpoint,
        "nemo2": Nemo2Checkpoint,
    }
    return openers[kind](path, trust_remote_code=trust_remote_code)


class Checkpoint(ABC):
    """A checkpoint whose architecture is known and whose weights are still on disk."""

    kind: str
    config_name = CONFIG_NAME
    """The file that says what the model is."""

    is_quantized = False
    """Whether ``load`` gives the model quantizers."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise CheckpointError(
                "the model's directory does not exist",
                where=path,
                found=found,
                hint=f"give the directory that holds {self.config_name}; "
                "`slimtron-common demo-model DIR` writes a small real one",
            )
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.architecture = self._read_architecture()

    def _read_architecture(self) -> Architecture:
        path = self.path / self.config_name
        return architecture_from_config(read_json(path), source=str(path))

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer's files."""
        return self.path

    @property
    def num_parameters(self) -> int:
        """Parameters stored, a tied output layer counted once."""
        return sum(
            torch.Size(shape).numel()
            for _, rule in model_parameters(self.architecture)
            for shape in rule.hf_shapes
        )

    @property
    def weights_are_bytes(self) -> bool:
        """Whether all that its quantizers round fits into eight bits a weight."""
        return False

    def check_unquantized(self, where: str, *, loss: str) -> None:
        """Checks that the checkpoint gives a model no quantizers.

        Args:
            where: The field that named the checkpoint, for the message.
            loss: What would become of them.

        Raises:
            ConfigError: It holds quantizers.
        """
        if self.is_quantized:
            raise ConfigError(
                f"the checkpoint holds quantizers, which {loss}",
                where=where,
                found=f"{self.kind}:{self.path}",
                hint="`slimtron-quant export` writes it for inference engines",
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this model this one, for a job that is resumed or uses what another found.

        The fingerprint is a SHA-256 of the architecture and, of every weight file, its size and
        1 MiB in 16 pieces: it does not read all of a large model.
        """
        digest = hashlib.sha256(fingerprint(to_dict(self.architecture)).encode())
        for path in sorted(p for p in self.path.rglob("*") if p.suffix in _WEIGHT_SUFFIXES):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(self.path)} {size}".encode())
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return {"parameters": self.num_parameters, "fingerprint": digest.hexdigest()}

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes that the weights take on disk."""

    @abstractmethod
    def load(self, model: nn.Module, context: ParallelContext) -> None:
        """Fills this process's part of ``model`` in place."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored weights.

        Raises:
            CheckpointError: The config names no floating-point type of torch.
        """
        dtype = getattr(torch, self.architecture.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointError(
                "the type of the weights is unknown",
                where=self.path / self.config_name,
                found=self.architecture.dtype,
                allowed="float32, bfloat16, float16",
            )
        return dtype

    def compute_dtype(self, requested: str, device: str) -> torch.dtype:
        """Type to run the model in.

        Args:
            requested: torch's name of a type, or ``auto``: as stored on a GPU, float32 on the CPU.
            device: ``cpu`` or ``cuda``.
        """
        if requested == "auto":
            return self.dtype if device == "cuda" else torch.float32
        dtype: torch.dtype = getattr(torch, requested)
        return dtype

    def tokenizer(self) -> Any:
        """Loads the tokenizer beside the weights.

        Raises:
            CheckpointError: As ``load_tokenizer``, or the tokenizer is another model's.
        """
        tokenizer = load_tokenizer(self.tokenizer_path, trust_remote_code=self.trust_remote_code)
        if len(tokenizer) > self.architecture.vocab_size:
            raise CheckpointError(
                "the tokenizer has more tokens than the model has embeddings",
                where=self.path,
                found=f"{len(tokenizer)} tokens, {self.architecture.vocab_size} embeddings",
                hint="use the tokenizer that the model was trained with",
            )
        return tokenizer

    def companion_files(self) -> list[Path]:
        """Tokenizer and generation settings, to be copied to what is made of the model."""
        paths = [self.tokenizer_path / name for name in TOKENIZER_FILES]
        return [path for path in paths if path.is_file()]


def has_tokenizer(path: Path) -> bool:
    """Tells whether a tokenizer's files lie in a directory."""
    return any((path / name).is_file() for name in _TOKENIZERS)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of a directory, without asking any hub.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        raise CheckpointError(
            "no tokenizer lies beside the weights",
            where=path,
            allowed=" or ".join(_TOKENIZERS),
            hint="copy the original model's tokenizer files into the directory",
        )
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # The tokenizers library raises bare Exceptions for malformed files.
    except Exception as error:
        raise CheckpointError(f"the tokenizer cannot be read: {error}", where=path) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: The file is missing, malformed, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("the file is missing", where=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the file cannot be read: {error}", where=path) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            "the file must hold a JSON object", where=path, found=type(data).__name__
        )
    return data
