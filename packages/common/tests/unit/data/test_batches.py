from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimtron_common.data import DataConfig, TokenDataset, token_dataset
from slimtron_common.errors import CheckpointError, ConfigError, ParallelismError

EOS = 256
BOS = 257


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens; like many real ones it adds special tokens unless told not to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<eos>": EOS, "<bos>": BOS}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", model_max_length=16
    )


def numbered(num_sequences: int, seq_length: int = 4) -> TokenDataset:
    return TokenDataset(np.arange(num_sequences * seq_length).reshape(num_sequences, seq_length))


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


@pytest.mark.parametrize("num_sequences", [1, 5, 8, 13])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
def test_every_sequence_appears_once(
    num_sequences: int, micro_batch_size: int, dp_size: int
) -> None:
    dataset = numbered(num_sequences)
    if dp_size > num_sequences:
        with pytest.raises(ParallelismError, match=f"{num_sequences} sequences for {dp_size}"):
            dataset.batches(micro_batch_size, 0, dp_size)
        return
    shares = [dataset.batches(micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    seen = torch.cat([batch for share in shares for batch in share])
    assert sorted(seen.tolist()) == dataset.tokens.tolist()
    for share in shares:
        assert [len(batch) for batch in share[:-1]] == [micro_batch_size] * (len(share) - 1)
        assert 1 <= len(share[-1]) <= micro_batch_size
        assert all(batch.dtype == torch.int64 for batch in share)
    rows = [sum(map(len, share)) for share in shares]
    assert max(rows) - min(rows) <= 1


def test_one_rank_keeps_the_order() -> None:
    assert [batch.tolist() for batch in numbered(3, 2).batches(2)] == [[[0, 1], [2, 3]], [[4, 5]]]


@pytest.mark.parametrize("dp_rank", [-1, 2])
def test_a_rank_that_does_not_exist(dp_rank: int) -> None:
    with pytest.raises(ParallelismError, match="dp_rank"):
        numbered(4).batches(1, dp_rank, 2)


def test_an_empty_micro_batch() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        numbered(4).batches(0)


def test_fingerprint_is_that_of_the_tokens() -> None:
    dataset = numbered(3)
    expected = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in range(12))).hexdigest()
    assert dataset.fingerprint == expected
    assert numbered(4).fingerprint != expected


def test_documents_are_joined_by_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the first", "and the sécond", "third"])
    config = DataConfig(source=source, num_tokens=30, seq_length=5, shuffle=False)
    dataset = token_dataset(config, tokenizer)
    assert (dataset.num_sequences, dataset.seq_length) == (6, 5)
    text = tokenizer.decode(dataset.tokens.ravel())
    assert text == "the first<eos>and the sécond<eos>thir"


def test_without_an_end_token_the_begin_token_separates(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    config = DataConfig(source=source, num_tokens=7, seq_length=7, shuffle=False)
    eos = tokenizer.eos_token
    try:
        tokenizer.eos_token = None
        tokens = token_dataset(config, tokenizer).tokens
    finally:
        tokenizer.eos_token = eos
    assert tokens[0, 3] == BOS
    assert (tokens == BOS).sum() == 1


def test_same_seed_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {index}" for index in range(50)])

    def tokens(**changes: Any) -> str:
        config = DataConfig(source=source, num_tokens=400, seq_length=8, **changes)
        return token_dataset(config, tokenizer).fingerprint

    assert tokens(seed=1) == tokens(seed=1)
    assert len({tokens(seed=1), tokens(seed=2), tokens(shuffle=False)}) == 3


def test_pydoc_starts_with_its_first_topic(tokenizer: Any) -> None:
    from pydoc_data.topics import topics

    config = DataConfig(source="pydoc", num_tokens=256, seq_length=64, shuffle=False)
    text = tokenizer.decode(token_dataset(config, tokenizer).tokens.ravel())
    assert topics[min(topics)].startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(text) > 200


def test_too_few_tokens_name_the_source(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    config = DataConfig(source=source, num_tokens=100, seq_length=4)
    with pytest.raises(ConfigError) as caught:
        token_dataset(config, tokenizer)
    assert caught.value.where == source
    assert caught.value.found == "7 tokens"


def test_errors_of_the_source_keep_their_place(tmp_path: Path, tokenizer: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(ConfigError) as caught:
        token_dataset(DataConfig(source=source, num_tokens=4, text_field="body"), tokenizer)
    assert caught.value.where == f"{source}, line 1"
    with pytest.raises(CheckpointError) as missing:
        token_dataset(DataConfig(source="no.jsonl", num_tokens=4), tokenizer)
    assert missing.value.where == "no.jsonl"


def test_equal_shares() -> None:
    dataset = TokenDataset(np.zeros((6, 4), dtype=np.int64))
    dataset.check_equal_shares(3, where="num_tokens")
    with pytest.raises(ParallelismError, match="as many sequences") as caught:
        dataset.check_equal_shares(4, where="num_tokens")
    assert (caught.value.where, caught.value.allowed) == ("num_tokens", "a multiple of 4 sequences")
