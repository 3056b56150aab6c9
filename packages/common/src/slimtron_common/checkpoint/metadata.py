"""Refuse a distributed checkpoint that would run code.

torch's reader unpickles a distributed checkpoint's ``.metadata``. ``check_metadata`` reads the
same file first with an unpickler that knows only the classes such an index is made of.
``refuse_code`` is for what lies in the other files.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slimtron_common.errors import CheckpointError

__all__ = ["StoredTensor", "check_metadata", "refuse_code"]

_ALLOWED = {
    "builtins": {"dict", "list", "set", "tuple", "slice", "int", "str"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    # Where Python 3.13 says that these are.
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # Megatron-Core 0.16 keeps the plans of its writers.
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


class StoredTensor(NamedTuple):
    """What a distributed checkpoint's index says of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _ALLOWED.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextlib.contextmanager
def refuse_code() -> Iterator[None]:
    """Makes ``torch.load`` refuse, inside the block, pickles that would run code.

    Even where its caller, as torch's reader of distributed checkpoints, asks for them.
    """
    force, permit = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, permit)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_metadata(directory: Path) -> dict[str, StoredTensor]:
    """Checks the pickled index of a distributed checkpoint.

    Returns:
        Every tensor in it by its name.

    Raises:
        CheckpointError: The index is missing, corrupt, or names something that is no part of
            such an index.
    """
    path = directory / ".metadata"
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        entries = index.state_dict_metadata.items()
        return {
            name: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for name, entry in entries
            if hasattr(entry, "size")
        }
    except FileNotFoundError as error:
        raise CheckpointError(
            "the index of the distributed checkpoint is missing", where=path
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the index of the distributed checkpoint is corrupt or would run code, so it was "
            "not opened",
            where=path,
            found=error,
        ) from error
    except Exception as error:  # a truncated pickle raises nearly anything
        raise CheckpointError(
            f"the index of the distributed checkpoint is corrupt: {error}", where=path
        ) from error
