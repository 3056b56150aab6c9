"""What text to take, how much of it, and in what shape."""

from __future__ import annotations

from dataclasses import dataclass

from slimtron_common.errors import ConfigError

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text that a model is calibrated, scored or evaluated on.

    Raises:
        ConfigError: A field is out of range.
    """

    source: str
    """``pydoc`` (Python's own help topics), a file (``.txt``, ``.jsonl``, ``.json``, each of them
    also with ``.gz``; ``.parquet``), or ``hf:NAME[,CONFIG][:SPLIT]``."""

    num_tokens: int
    """How many tokens to take, rounded up to whole sequences."""

    seq_length: int = 512
    """Tokens in a sequence."""

    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel rank."""

    seed: int = 1234
    """Seeds the shuffle."""

    shuffle: bool = True
    """Whether documents come in random order. A text file is one document."""

    text_field: str = "text"
    """The field (JSON), column (Parquet) or feature (datasets) that holds the text."""

    def __post_init__(self) -> None:
        minimums = {"num_tokens": 1, "seq_length": 2, "micro_batch_size": 1, "seed": 0}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value < minimum:
                raise ConfigError(
                    "is too small", where=name, found=value, allowed=f"{minimum} or more"
                )
        for name in ("source", "text_field"):
            if not getattr(self, name):
                raise ConfigError("is empty", where=name)

    @property
    def num_sequences(self) -> int:
        """How many whole sequences it takes to hold ``num_tokens``."""
        return -(-self.num_tokens // self.seq_length)
