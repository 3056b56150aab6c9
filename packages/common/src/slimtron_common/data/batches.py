"""The tokens of a job, and the micro-batches of each data-parallel rank."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimtron_common.data.config import DataConfig
from slimtron_common.data.packing import join, pack
from slimtron_common.data.sources import open_source
from slimtron_common.errors import ConfigError, ParallelismError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenDataset", "token_dataset", "token_stream"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class TokenDataset:
    """Full sequences of tokens, the same on every rank."""

    tokens: npt.NDArray[np.int64]
    """``[n, s]``, token ids."""

    @property
    def num_sequences(self) -> int:
        """The number of sequences, ``n``."""
        return int(self.tokens.shape[0])

    @property
    def seq_length(self) -> int:
        """Tokens in a sequence, ``s``."""
        return int(self.tokens.shape[1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the token ids as little-endian int64, row by row."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()

    def batches(
        self, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> list[torch.Tensor]:
        """Returns the micro-batches of one data-parallel rank.

        Over all ranks every sequence appears exactly once, so where ``dp_size`` does not divide
        the number of sequences some ranks have one more than others, and where
        ``micro_batch_size`` does not divide a rank's share its last micro-batch is smaller.
        Forward passes in which data-parallel ranks meet need ``check_equal_shares``.

        Args:
            micro_batch_size: Sequences in a micro-batch.
            dp_rank: The data-parallel rank; it gets sequences ``dp_rank``, ``dp_rank + dp_size``
                and so on.
            dp_size: The number of data-parallel ranks.

        Returns:
            Tensors ``[b, s]``, int64, on the CPU.

        Raises:
            ConfigError: ``micro_batch_size`` is not positive.
            ParallelismError: There are fewer sequences than ranks.
        """
        import torch

        if micro_batch_size < 1:
            raise ConfigError(
                "is too small",
                where="micro_batch_size",
                found=micro_batch_size,
                allowed="1 or more",
            )
        if not 0 <= dp_rank < dp_size:
            raise ParallelismError(
                "is not a data-parallel rank",
                where="dp_rank",
                found=dp_rank,
                allowed=f"less than {dp_size}",
            )
        if dp_size > self.num_sequences:
            raise ParallelismError(
                "there are fewer sequences than data-parallel ranks",
                found=f"{self.num_sequences} sequences for {dp_size} ranks",
                hint=f"take at least {dp_size * self.seq_length} tokens, shorten seq_length, "
                "or start fewer processes",
            )
        shard = torch.tensor(self.tokens[dp_rank::dp_size])
        return list(torch.split(shard, micro_batch_size))

    def check_equal_shares(self, dp_size: int, *, where: str) -> None:
        """Refuses what gives some data-parallel ranks a sequence more than others.

        Under expert parallelism the ranks wait for each other in every layer, so all of them must
        make the same number of forward passes.

        Args:
            dp_size: The number of data-parallel ranks.
            where: The setting to name.

        Raises:
            ParallelismError: ``dp_size`` does not divide the number of sequences.
        """
        if self.num_sequences % dp_size:
            raise ParallelismError(
                "with expert parallelism every data-parallel process needs as many sequences as "
                "the others",
                where=where,
                found=f"{self.num_sequences} sequences for {dp_size} processes",
                allowed=f"a multiple of {dp_size} sequences",
            )


def token_dataset(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TokenDataset:
    """Reads a source until it has given ``config.num_sequences`` full sequences.

    Documents are separated by the end-of-sequence token, or by the beginning-of-sequence token
    where there is no such; the tokenizer adds no other special tokens.

    Args:
        config: What to read, and how much.
        tokenizer: The model's tokenizer.

    Returns:
        ``config.num_sequences`` sequences of ``config.seq_length`` tokens.

    Raises:
        CheckpointError: The source is missing or damaged.
        ConfigError: The source is of an unknown kind, lacks the text field, or holds fewer tokens
            than asked for.
        MissingDependencyError: A package that reads such a source is not installed.
    """
    try:
        tokens = pack(
            _documents(config, tokenizer),
            seq_length=config.seq_length,
            num_sequences=config.num_sequences,
            separator_id=_separator_id(tokenizer),
        )
    except ConfigError as error:
        error.where = error.where or config.source
        raise
    dataset = TokenDataset(tokens)
    logger.info(
        "Took %d sequences of %d tokens from %s (SHA-256 %.12s)",
        dataset.num_sequences,
        dataset.seq_length,
        config.source,
        dataset.fingerprint,
    )
    return dataset


def token_stream(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Reads a source to its end, as ``token_dataset`` joins its documents.

    Args:
        config: What to read; not how much.
        tokenizer: The model's tokenizer.

    Returns:
        Token ids.
    """
    return join(_documents(config, tokenizer), _separator_id(tokenizer))


def _documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterator[int]]:
    documents = open_source(
        config.source,
        text_field=config.text_field,
        shuffle_seed=config.seed if config.shuffle else None,
    )
    return (_tokenize(pieces, tokenizer) for pieces in documents)


def _separator_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    separator_id: int | None = tokenizer.eos_token_id
    return tokenizer.bos_token_id if separator_id is None else separator_id


def _tokenize(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for piece in pieces:
        # Not verbose: that a document is longer than the model's context is no mistake here.
        yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
