"""Text to work with and text to evaluate on that do not overlap."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from slimtron_common.data.batches import TokenDataset, token_dataset
from slimtron_common.data.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["held_out_datasets"]


def held_out_datasets(
    evaluation: DataConfig, work: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenDataset, TokenDataset]:
    """Reads the text that evaluates a model, and the text that it is worked on with.

    Where both come from one source, they are one stream: its first tokens evaluate, and the ones
    after them are worked with.

    Args:
        evaluation: The text to evaluate on, whole sequences of it.
        work: The text that calibrates or scores, whole sequences of it.
        tokenizer: The model's tokenizer.

    Returns:
        Both, in that order.

    Raises:
        SlimtronError: As ``token_dataset``.
    """
    if (evaluation.source, evaluation.text_field) != (work.source, work.text_field):
        return token_dataset(evaluation, tokenizer), token_dataset(work, tokenizer)
    total = evaluation.num_tokens + work.num_tokens
    stream = replace(evaluation, num_tokens=total, seq_length=total)
    tokens = token_dataset(stream, tokenizer).tokens.reshape(-1)
    held_out, rest = tokens[: evaluation.num_tokens], tokens[evaluation.num_tokens :]
    return (
        TokenDataset(held_out.reshape(-1, evaluation.seq_length)),
        TokenDataset(rest.reshape(-1, work.seq_length)),
    )
