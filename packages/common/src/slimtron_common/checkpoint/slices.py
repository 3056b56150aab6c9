"""Read slices out of a distributed checkpoint, and nothing else of it.

Megatron-Core's own reader describes a tensor's other slices as those of other processes, of which
there must be some. Here a process reads what it asks for, whatever the others do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

__all__ = ["SliceReader"]


class SliceReader(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Fills sharded tensors in place; a ``sharded_strategy`` of ``dist_checkpointing.load``."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, *_: Any) -> Any:
        """Returns the same structure with tensors in the place of sharded ones.

        Raises:
            CheckpointingException: A tensor is missing or has another shape.
        """
        reader = FileSystemReader(str(checkpoint_dir))
        index = reader.read_metadata()
        planner = _Planner()
        filled = dict_list_map_inplace(
            lambda sharded: planner.add(sharded, index), sharded_state_dict
        )
        reader.set_up_storage_reader(index, is_coordinator=False)
        reader.read_data(reader.prepare_local_plan(LoadPlan(planner.items)), planner).wait()
        return filled


class _Planner(LoadPlanner):
    """Knows which slice of the checkpoint belongs where."""

    def __init__(self) -> None:
        self.items: list[ReadItem] = []
        self._targets: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def add(self, sharded: Any, index: Metadata) -> torch.Tensor:
        """Plans to read one sharded tensor, and returns what it is read into."""
        stored = index.state_dict_metadata.get(sharded.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointingException(f"{sharded.key} is missing")
        # An embedding's padding may be another.
        if not sharded.allow_shape_mismatch and stored.size != sharded.global_shape:
            raise CheckpointingException(
                f"{sharded.key} is stored as {tuple(stored.size)}, not {sharded.global_shape}"
            )
        tensor: torch.Tensor = sharded.data.detach()
        if sharded.allow_shape_mismatch:
            tensor.zero_()
        shape = torch.Size((1,) * sharded.prepend_axis_num + tuple(sharded.local_shape))
        offset = torch.Size(sharded.global_offset)
        self._targets[sharded.key, offset] = tensor.view(shape)
        chunk = ChunkStorageMetadata(offset, shape)
        self.items += create_read_items_for_chunk_list(sharded.key, stored, [chunk])
        return tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Returns the part of a sharded tensor that one stored piece fills."""
        where = read_item.dest_index
        assert where.offset is not None
        target = self._targets[where.fqn, where.offset]
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Does nothing: the slice is where it belongs."""

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    def create_local_plan(self) -> LoadPlan:
        """Returns what is to be read."""
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Does nothing: no bytes are asked for."""
