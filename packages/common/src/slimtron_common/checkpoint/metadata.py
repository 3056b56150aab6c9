"""Refuse a distributed checkpoint whose index would run code.

torch's reader unpickles a distributed checkpoint's ``.metadata``. This reads the same file
first with an unpickler that knows only the classes such an index is made of.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from slimtron_common.errors import CheckpointError

__all__ = ["check_metadata"]

_ALLOWED = {
    "builtins": {"dict", "list", "set", "tuple", "slice", "int", "str"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": set(),
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
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and name.startswith(("float", "bfloat", "int", "uint", "bool"))
        if name not in _ALLOWED.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def check_metadata(directory: Path) -> None:
    """Checks the pickled index of a distributed checkpoint.

    Raises:
        CheckpointError: The index is missing, corrupt, or names something that is no part of
            such an index.
    """
    path = directory / ".metadata"
    try:
        _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
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
