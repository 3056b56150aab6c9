from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.errors import CheckpointError
from slimtron_common.evaluation import Distance, Evaluation, evaluate
from slimtron_common.evaluation.evaluate import rank_key
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.testing import write_tiny_model

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny_model(folder / str(seed), seed=seed, tokenizer=False, initializer_range=0.05)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    # A shorter last batch, as data parallelism makes them.
    return [torch.randint(0, VOCAB_SIZE, (b, 20), generator=generator) for b in (2, 2, 1)]


def load(path: Path, context: ParallelContext) -> tuple[Checkpoint, nn.Module]:
    checkpoint = open_checkpoint(f"hf:{path}")
    model = build_model(checkpoint.architecture, context, dtype=torch.float32)
    checkpoint.load(model, context)
    return checkpoint, model


def logits_of_transformers(path: Path, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return [model(tokens).logits.double() for tokens in batches]


def test_perplexity_is_that_of_transformers(
    paths: list[Path], batches: list[torch.Tensor], context: ParallelContext
) -> None:
    found = evaluate(load(paths[0], context)[1], batches, context, vocab_size=VOCAB_SIZE)
    losses = torch.cat(
        [
            nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            for logits, tokens in zip(
                logits_of_transformers(paths[0], batches), batches, strict=True
            )
        ]
    )
    assert found.num_tokens == losses.numel() == 5 * 19
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert found.distances == {}


def test_distances_are_those_of_the_whole_distributions(
    paths: list[Path], batches: list[torch.Tensor], context: ParallelContext, tmp_path: Path
) -> None:
    evaluate(load(paths[0], context)[1], batches, context, vocab_size=VOCAB_SIZE, record=tmp_path)
    found = evaluate(
        load(paths[1], context)[1],
        batches,
        context,
        vocab_size=VOCAB_SIZE,
        references={"original": tmp_path},
    )
    reference, model = (
        torch.cat([logits[:, :-1].flatten(0, 1) for logits in logits_of_transformers(p, batches)])
        for p in paths
    )
    kl = nn.functional.kl_div(
        model.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    agreement = (model.argmax(-1) == reference.argmax(-1)).double().mean()
    assert found.distances["original"].kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.distances["original"].agreement == pytest.approx(agreement.item())
    assert kl > 0.01, "the comparison would be of nothing"


def test_distance_to_itself_is_zero(
    paths: list[Path], batches: list[torch.Tensor], context: ParallelContext, tmp_path: Path
) -> None:
    _, model = load(paths[0], context)
    first = evaluate(model, batches, context, vocab_size=VOCAB_SIZE, record=tmp_path)
    second = evaluate(
        model, batches, context, vocab_size=VOCAB_SIZE, references={"a": tmp_path, "b": tmp_path}
    )
    assert second.distances == {"a": Distance(0.0, 1.0), "b": Distance(0.0, 1.0)}
    assert second.loss == first.loss


def test_only_the_true_vocabulary_counts(
    batches: list[torch.Tensor], context: ParallelContext, tmp_path: Path
) -> None:
    """Rows that only pad the vocabulary must not draw probability, however large."""
    path = write_tiny_model(tmp_path / "padded", vocab_size=304, tokenizer=False)
    _, model = load(path, context)
    with torch.no_grad():
        model.get_parameter("output_layer.weight")[VOCAB_SIZE:] = 100.0
    found = evaluate(model, batches, context, vocab_size=VOCAB_SIZE)
    logits = [x[..., :VOCAB_SIZE] for x in logits_of_transformers(path, batches)]
    losses = [
        nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), t[:, 1:].flatten(), reduction="none")
        for x, t in zip(logits, batches, strict=True)
    ]
    assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_recording_of_other_data_is_refused(
    paths: list[Path], batches: list[torch.Tensor], context: ParallelContext, tmp_path: Path
) -> None:
    _, model = load(paths[0], context)
    evaluate(model, batches[:1], context, vocab_size=VOCAB_SIZE, record=tmp_path)
    arguments: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "references": {"original": tmp_path}}
    with pytest.raises(CheckpointError, match="fewer batches"):
        evaluate(model, batches, context, **arguments)
    with pytest.raises(CheckpointError, match="another shape"):
        evaluate(model, batches[2:], context, **arguments)
    with pytest.raises(CheckpointError, match="no finished recording"):
        evaluate(
            model, batches, context, vocab_size=VOCAB_SIZE, references={"x": tmp_path / "nothing"}
        )


def test_model_that_computes_nan_is_told(
    paths: list[Path], batches: list[torch.Tensor], context: ParallelContext
) -> None:
    _, model = load(paths[0], context)
    with torch.no_grad():
        model.get_parameter("decoder.final_layernorm.weight").fill_(torch.nan)
    found = evaluate(model, batches, context, vocab_size=VOCAB_SIZE)
    assert math.isnan(found.loss)
    assert math.isnan(found.perplexity)


def test_evaluation_survives_json() -> None:
    found = Evaluation(
        perplexity=7.5, loss=2.0, num_tokens=19, distances={"original": Distance(0.1, 0.9)}
    )
    assert Evaluation.from_dict(found.to_dict()) == found


def test_shards_of_different_ranks_have_different_names(context: ParallelContext) -> None:
    places = [
        dataclasses.replace(context, tp_rank=tp, cp_rank=cp, dp_rank=dp)
        for tp, cp, dp in itertools.product((0, 1), repeat=3)
    ]
    assert len({rank_key(place) for place in places}) == 8
