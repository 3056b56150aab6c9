"""Text sources to tokens to packed sequences, sharded over the data-parallel ranks."""

from __future__ import annotations

from slimtron_common.data.batches import TokenDataset, token_dataset
from slimtron_common.data.config import DataConfig
from slimtron_common.data.held_out import held_out_datasets
from slimtron_common.data.packing import pack
from slimtron_common.data.sources import check_source, open_source

__all__ = [
    "DataConfig",
    "TokenDataset",
    "check_source",
    "held_out_datasets",
    "open_source",
    "pack",
    "token_dataset",
]
