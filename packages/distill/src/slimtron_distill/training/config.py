"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimtron_common.errors import ConfigError

__all__ = ["CheckpointConfig", "GuardConfig", "OptimizerConfig", "TrainingConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long, on how much at a time, and how memory is saved."""

    steps: int
    """Updates of the weights."""

    seq_length: int = 512
    """Tokens in a sequence."""

    global_batch_size: int = 8
    """Sequences in an update, over all data-parallel processes."""

    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel process; gradients are accumulated until
    ``global_batch_size`` have gone through."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Which of the student's activations are computed again for the backward pass instead of kept:
    attention's (``selective``), or all inside a layer (``full``)."""

    logit_memory: float = 2.0
    """GiB for the logits of both models at a time. Where a micro-batch's take more, output layers
    and loss are computed for one part of its tokens after another (not with the language-model
    loss, nor with a cached teacher)."""

    def __post_init__(self) -> None:
        if not self.logit_memory > 0:
            raise ConfigError(
                "is too small", where="logit_memory", found=self.logit_memory, allowed="above 0"
            )
        for name in ("steps", "global_batch_size", "micro_batch_size", "seq_length"):
            _at_least(1, name, getattr(self, name))

    @property
    def logit_bytes(self) -> int:
        """``logit_memory`` in bytes."""
        return int(self.logit_memory * 2**30)

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches of one data-parallel process in an update.

        Raises:
            ConfigError: The sequences of an update do not divide.
        """
        together = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % together:
            raise ConfigError(
                "the data-parallel processes cannot share it out in whole micro-batches",
                where="training.global_batch_size",
                found=self.global_batch_size,
                allowed=f"a multiple of micro_batch_size {self.micro_batch_size} times "
                f"{data_parallel_size} data-parallel processes",
            )
        return self.global_batch_size // together


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule. Norms and biases are not decayed."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""

    min_lr: float = 1e-5
    """Learning rate of the last step."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises to ``lr``, linearly."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    clip_grad: float = 1.0
    """Largest norm of the gradient, over the whole model; 0 for no limit."""

    def __post_init__(self) -> None:
        for name in ("min_lr", "weight_decay", "beta1", "beta2", "clip_grad", "warmup_steps"):
            _at_least(0, name, getattr(self, name))
        if self.eps <= 0:
            raise ConfigError("is too small", where="eps", found=self.eps, allowed="above 0")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(
                    "is too large", where=name, found=getattr(self, name), allowed="below 1"
                )
        if not self.lr > 0 or self.lr < self.min_lr:
            raise ConfigError(
                "the learning rate must be positive and not below min_lr",
                where="lr",
                found=f"{self.lr} with min_lr {self.min_lr}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What happens to an update whose loss or gradient is not finite, or whose loss jumps."""

    action: Literal["stop", "skip"] = "stop"
    """End the run (its last checkpoint stays), or leave the weights as they are and go on with the
    next batch. Skipped updates are logged, counted and reported."""

    spike_factor: float | None = None
    """A loss above this multiple of the median of the last ``window`` is a jump; None for any."""

    window: int = 32
    """Good losses that the median is taken of; nothing is a jump before there are as many."""

    max_skipped: int = 10
    """A run that skips more updates is stopped."""

    def __post_init__(self) -> None:
        _at_least(1, "window", self.window)
        _at_least(1, "max_skipped", self.max_skipped)
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(
                "every loss would be a jump",
                where="spike_factor",
                found=self.spike_factor,
                allowed="above 1",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What a run that is interrupted goes on from."""

    interval: int = 100
    """Steps between two checkpoints; the last step always leaves one."""

    keep: int = 2
    """How many there are at a time; an old one goes when the new one is complete."""

    asynchronous: bool = True
    """Whether training goes on while a checkpoint is being written."""

    def __post_init__(self) -> None:
        _at_least(1, "interval", self.interval)
        _at_least(1, "keep", self.keep)


def _at_least(minimum: float, name: str, value: float) -> None:
    if not value >= minimum:
        raise ConfigError("is too small", where=name, found=value, allowed=f"{minimum} or more")
