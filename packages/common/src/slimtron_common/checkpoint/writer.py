"""Write one directory together from many processes, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from slimtron_common.atomic import atomic_directory
from slimtron_common.checkpoint.safetensors_file import SafetensorsWriter
from slimtron_common.parallel.context import ParallelContext

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "collective_directory",
    "copy_files",
    "write_safetensors",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


@contextlib.contextmanager
def collective_directory(
    path: Path, context: ParallelContext, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yields one temporary directory to all processes and renames it to ``path`` at the end.

    The directory must lie on storage that all processes share. It appears only when every
    process has left the block without an error.
    """
    with contextlib.ExitStack() as stack:
        shared: list[object] = [None]
        if context.is_main:
            try:
                # A string: not every version of Python unpickles the Path of another.
                shared = [str(stack.enter_context(atomic_directory(path, overwrite=overwrite)))]
            except Exception as error:
                shared = [error]
        dist.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], Exception):
            raise shared[0]
        yield Path(str(shared[0]))
        dist.barrier()
    # The rename is over before anybody looks for the result.
    dist.barrier()


def write_safetensors(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    context: ParallelContext,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Streams named tensors into safetensors files of bounded size, with an index if several.

    Each pipeline stage's writer writes its own files; one tensor at a time is in memory.

    Args:
        directory: An existing directory on shared storage.
        tensors: This stage's tensors; every process walks them, writers keep them.
        context: This process's place.
        max_shard_bytes: Upper bound of a file, unless one tensor is larger.
    """
    parts: list[tuple[str, dict[str, int]]] = []
    with contextlib.ExitStack() as stack:
        file: SafetensorsWriter | None = None
        sizes: dict[str, int] = {}
        for name, tensor in tensors:
            if not context.is_writer:
                continue
            if file is None or file.num_bytes + _size(tensor) > max_shard_bytes:
                stack.close()
                # In the order of their names the parts are in the order of the model.
                part, sizes = f".part-{context.pp_rank:05d}-{len(parts):05d}", {}
                parts.append((part, sizes))
                file = stack.enter_context(SafetensorsWriter(directory / part))
            file.add(name, tensor)
            sizes[name] = _size(tensor)
            # A generator that goes on would find it still held here.
            del tensor

    gathered: list[list[tuple[str, dict[str, int]]]] = [[] for _ in range(context.world_size)]
    dist.all_gather_object(gathered, parts)
    if context.is_main:
        _name_parts(directory, sorted(part for parts in gathered for part in parts))
    dist.barrier()


def copy_files(files: Iterable[Path], directory: Path) -> None:
    """Copies files by name into ``directory``."""
    for file in files:
        shutil.copyfile(file, directory / file.name)


def _name_parts(directory: Path, parts: list[tuple[str, dict[str, int]]]) -> None:
    if len(parts) == 1:
        (directory / parts[0][0]).rename(directory / SINGLE_NAME)
        return
    weight_map = {}
    for number, (part, sizes) in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (directory / part).rename(directory / name)
        weight_map.update(dict.fromkeys(sizes, name))
    total = sum(size for _, sizes in parts for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes one safetensors file through to the disk, readable as the umask says."""
    with SafetensorsWriter(path) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
