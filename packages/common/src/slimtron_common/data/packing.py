"""Documents of any length to sequences of one length, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from slimtron_common.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["join", "pack"]


def pack(
    documents: Iterable[Iterable[int]],
    *,
    seq_length: int,
    num_sequences: int,
    separator_id: int | None,
) -> npt.NDArray[np.int64]:
    """Joins documents and cuts the result into full sequences.

    Documents are consumed only as far as they are needed. A document may begin in one sequence
    and end in another; one without tokens leaves no trace.

    Args:
        documents: The token ids of each document.
        seq_length: Tokens in a sequence.
        num_sequences: Sequences to make.
        separator_id: The token between two documents; ``None`` for nothing between them.

    Returns:
        ``[num_sequences, seq_length]``, int64.

    Raises:
        ConfigError: The documents hold fewer tokens than ``num_sequences * seq_length``.
    """
    import numpy as np

    num_tokens = num_sequences * seq_length
    tokens = np.fromiter(islice(join(documents, separator_id), num_tokens), dtype=np.int64)
    if tokens.size < num_tokens:
        whole = tokens.size // seq_length * seq_length
        hint = f"ask for {whole} tokens at most" if whole else "shorten seq_length"
        raise ConfigError(
            "holds fewer tokens than asked for",
            found=f"{tokens.size} tokens",
            allowed=f"{num_tokens} tokens ({num_sequences} sequences of {seq_length}) or more",
            hint=f"{hint}, or give a longer source",
        )
    return tokens.reshape(num_sequences, seq_length)


def join(documents: Iterable[Iterable[int]], separator_id: int | None) -> Iterator[int]:
    """Yields the tokens of all documents, with ``separator_id`` between two of them."""
    separator: tuple[int, ...] = ()
    for document in documents:
        tokens = iter(document)
        for first in islice(tokens, 1):
            yield from separator
            yield first
            yield from tokens
            separator = () if separator_id is None else (separator_id,)
