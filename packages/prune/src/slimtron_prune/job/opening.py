"""The checks that scoring and pruning jobs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.config import to_dict
from slimtron_common.data import TokenDataset
from slimtron_common.data.config import DataConfig
from slimtron_common.errors import ConfigError, ParallelismError
from slimtron_common.integrations.mamba import check_mamba
from slimtron_common.manifest import environment_versions
from slimtron_common.memory import activation_bytes, check_memory, shard_parameters
from slimtron_common.models import Architecture
from slimtron_common.parallel.context import (
    check_world_size,
    resolve_device,
    world_size_from_environment,
)
from slimtron_prune.job.config import ModelJobConfig
from slimtron_prune.scoring.collect import check_layout
from slimtron_prune.scoring.scores import score_bytes

__all__ = ["OpenModel", "open_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """The model of a job, its weights still on disk."""

    config: ModelJobConfig
    checkpoint: Checkpoint
    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    """Type to compute in."""

    world_size: int

    @property
    def architecture(self) -> Architecture:
        """What the model is."""
        return self.checkpoint.architecture

    @property
    def data_parallel_size(self) -> int:
        """Processes that see different sequences."""
        return self.world_size // self.config.parallel.model_parallel_size

    def check_layout(self, architecture: Architecture) -> None:
        """Refuses a layout that a model, this or a smaller one, cannot be cut into."""
        parallel = self.config.parallel
        architecture.check_parallel(
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            expert_parallel_size=parallel.expert_parallel_size,
        )

    def check_scoring(self) -> None:
        """Refuses what the model cannot be scored with."""
        check_layout(
            self.architecture,
            tensor_parallel_size=self.config.parallel.tensor_parallel_size,
            context_parallel_size=self.config.parallel.context_parallel_size,
        )
        self.check_length("scoring.seq_length", self.config.scoring.seq_length)

    def check_length(self, where: str, length: int) -> None:
        """Refuses sequences that the model has no positions for."""
        limit = self.architecture.max_position_embeddings
        if length > limit:
            raise ConfigError(
                "sequences are longer than the model's positions",
                where=where,
                found=length,
                allowed=f"at most {limit}",
            )

    def check_sequences(self, where: str, dataset: TokenDataset) -> None:
        """Refuses too few or unequally many sequences for the data-parallel processes."""
        if self.config.parallel.expert_parallel_size > 1:
            dataset.check_equal_shares(self.data_parallel_size, where=where)
        if dataset.num_sequences < self.data_parallel_size:
            raise ConfigError(
                "every data-parallel process needs a sequence",
                where=where,
                found=f"{dataset.num_sequences} sequences",
                allowed=f"{self.data_parallel_size} or more",
            )

    def memory(self, shapes: list[tuple[int, int]], *, scores: bool) -> dict[str, int]:
        """What one process holds at one time, in bytes; refused if it has not the memory.

        Args:
            shapes: Micro-batch size and sequence length of every kind of forward pass.
            scores: Whether the model is scored.
        """
        parallel = self.config.parallel
        parts = {
            "weights": round(shard_parameters(self.checkpoint, parallel) * self.dtype.itemsize),
            "activations": activation_bytes(
                self.architecture, parallel, shapes, self.dtype.itemsize
            ),
        }
        if scores:
            parts["scores"] = score_bytes(self.architecture)
        check_memory(
            parts,
            self.device,
            hint="raise tensor_parallel_size or pipeline_parallel_size, or lower the batch sizes "
            "and sequence lengths",
        )
        return parts

    def scoring_text(self) -> DataConfig:
        """The text to score on."""
        scoring = self.config.scoring
        return self.text(scoring.source, scoring.num_tokens, scoring.seq_length, scoring.text_field)

    def text(
        self, source: str | None, num_tokens: int, seq_length: int, text_field: str
    ) -> DataConfig:
        """A text of this job."""
        assert source is not None, "the config has checked it"
        return DataConfig(
            source=source,
            num_tokens=num_tokens,
            seq_length=seq_length,
            seed=self.config.seed,
            text_field=text_field,
        )

    def identity(self, **inputs: str | None) -> dict[str, Any]:
        """What makes a job this job: its settings and the fingerprints of its inputs."""
        return {
            "config": to_dict(self.config),
            "model": self.checkpoint.identity,
            **inputs,
            "world_size": self.world_size,
            "device": self.device,
            "versions": environment_versions(),
        }


def open_model(config: ModelJobConfig, world_size: int | None) -> OpenModel:
    """Opens the model of a job and checks its layout.

    Args:
        config: The job.
        world_size: Processes that the job will have; those that were started without it.
    """
    device = resolve_device(config.device)
    world_size = world_size or world_size_from_environment()
    check_world_size(config.parallel, world_size)
    checkpoint = open_checkpoint(config.model, trust_remote_code=config.trust_remote_code)
    checkpoint.check_unquantized("model", loss="pruning would lose: prune first, then quantize")
    model = OpenModel(
        config=config,
        checkpoint=checkpoint,
        device=device,
        dtype=checkpoint.compute_dtype(config.dtype, device),
        world_size=world_size,
    )
    if config.parallel.context_parallel_size > 1:
        raise ParallelismError(
            "this version scores and evaluates over tensor, pipeline, expert and data parallelism",
            where="parallel.context_parallel_size",
            found=config.parallel.context_parallel_size,
            allowed=1,
            hint="raise tensor_parallel_size or pipeline_parallel_size: a checkpoint opens in "
            "any layout, whatever it was trained at",
        )
    model.check_layout(checkpoint.architecture)
    if checkpoint.architecture.hybrid is not None:
        check_mamba()
    return model
