"""The job's text: what is held out, and what is trained on."""

from __future__ import annotations

import itertools
from typing import Any

from slimtron_common.data import DataConfig, TokenDataset, check_source, token_dataset
from slimtron_common.errors import ConfigError
from slimtron_distill.job.config import DistillJobConfig

__all__ = ["check_text", "open_text"]


def check_text(config: DistillJobConfig) -> None:
    """Refuses early what ``open_text`` would refuse at the first document."""
    check_source(config.data.source, text_field=config.data.text_field)
    if config.evaluation.source is not None:
        check_source(config.evaluation.source, text_field=config.evaluation.text_field)


def open_text(config: DistillJobConfig, tokenizer: Any) -> tuple[TokenDataset, TokenDataset]:
    """Reads the job's text.

    Args:
        config: The job.
        tokenizer: The student's.

    Returns:
        The held-out sequences, and those to train on, one token longer than
        ``training.seq_length``.

    Raises:
        ConfigError: There is too little text.
    """
    evaluation, training = config.evaluation, config.training
    length = training.seq_length + 1
    wanted = training.steps * training.global_batch_size * length
    if config.data.num_tokens is not None:
        wanted = min(wanted, config.data.num_tokens)
    shared = evaluation.source is None
    held_out = evaluation.num_tokens if shared else 0
    stream = _stream(config, held_out + wanted, tokenizer)
    count = (len(stream) - held_out) // length
    if count < 1:
        raise ConfigError(
            "too little text is left to train on",
            where="data",
            found=f"{len(stream)} tokens, {held_out} of them held out",
            allowed=f"{held_out + length} or more",
        )
    sequences = TokenDataset(stream[held_out : held_out + count * length].reshape(count, length))
    if shared:
        return TokenDataset(stream[:held_out].reshape(-1, evaluation.seq_length)), sequences
    data = DataConfig(
        source=str(evaluation.source),
        num_tokens=evaluation.num_tokens,
        seq_length=evaluation.seq_length,
        seed=config.seed,
        text_field=evaluation.text_field,
    )
    return token_dataset(data, tokenizer), sequences


def _stream(config: DistillJobConfig, num_tokens: int, tokenizer: Any) -> Any:
    """At most ``num_tokens`` tokens, ``[n]`` int64."""
    import numpy as np

    from slimtron_common.data.batches import token_stream

    data = DataConfig(
        source=config.data.source,
        num_tokens=num_tokens,
        seed=config.seed,
        text_field=config.data.text_field,
    )
    tokens = itertools.islice(token_stream(data, tokenizer), num_tokens)
    return np.fromiter(tokens, dtype=np.int64)
