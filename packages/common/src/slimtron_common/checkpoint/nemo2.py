"""Checkpoints of NeMo 2, read without NeMo.

``DIR/context/model.yaml`` says what the model is, the tokenizer lies in ``DIR/context``, and
``DIR/weights`` is a ``torch_dist`` checkpoint with the names of the model under ``module.``,
beside the optimizer's state, which is not read. The pickles of the context are never opened.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from slimtron_common.checkpoint.base import Checkpoint, has_tokenizer, load_tokenizer
from slimtron_common.checkpoint.megatron import load_distributed
from slimtron_common.checkpoint.metadata import StoredTensor, check_metadata
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.nemo import architecture_from_nemo
from slimtron_common.parallel.context import ParallelContext

__all__ = ["Nemo2Checkpoint"]

_PREFIX = "module."
_EMBEDDING = f"{_PREFIX}embedding.word_embeddings.weight"


class Nemo2Checkpoint(Checkpoint):
    """A checkpoint that NeMo 2 wrote."""

    kind = "nemo2"
    config_name = "context/model.yaml"

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.weights = path / "weights"
        super().__init__(path, trust_remote_code=trust_remote_code)
        rows = self._stored[_EMBEDDING].shape[0]
        if rows < self.architecture.vocab_size:
            raise CheckpointError(
                "the vocabulary is not that of the weights",
                where=path / self.config_name,
                found=self.architecture.vocab_size,
                allowed=f"at most {rows}",
            )

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
        context = self.path / "context"
        candidates = [context / "nemo_tokenizer", context]
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
            stored.num_bytes for name, stored in self._stored.items() if name.startswith(_PREFIX)
        )

    def load(self, model: nn.Module, context: ParallelContext) -> None:
        load_distributed(model, self.weights)


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
