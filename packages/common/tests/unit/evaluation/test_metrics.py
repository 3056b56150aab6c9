from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimtron_common.evaluation import metrics
from slimtron_common.evaluation.metrics import (
    MetricAccumulator,
    vocab_parallel_argmax,
    vocab_parallel_kl,
    vocab_parallel_token_nll,
)


def random_logits(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def reference_kl(reference: Tensor, logits: Tensor) -> Tensor:
    p = reference.double().log_softmax(-1)
    q = logits.double().log_softmax(-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nll_is_cross_entropy(dtype: torch.dtype) -> None:
    logits = random_logits(2, 7, 33, seed=0).to(dtype)
    targets = torch.randint(33, (2, 7), generator=torch.Generator().manual_seed(1))
    nll = vocab_parallel_token_nll(logits, targets, 0, None)
    expected = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), targets.flatten(), reduction="none"
    ).view(2, 7)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-6)


def test_kl_is_torch_kl_div() -> None:
    reference, logits = random_logits(2, 5, 40, seed=0), random_logits(2, 5, 40, seed=1)
    expected = torch.nn.functional.kl_div(
        logits.double().log_softmax(-1),
        reference.double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    actual = vocab_parallel_kl(reference, logits, None)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_small_divergences_keep_their_digits() -> None:
    reference = random_logits(4, 16, 1000, seed=0)
    logits = reference + random_logits(4, 16, 1000, seed=1, scale=1e-2)
    expected = reference_kl(reference, logits)
    actual = vocab_parallel_kl(reference, logits, None)
    # The KL is about 5e-5; rounding in the sums of fp32 leaves some 1e-7 of 1.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-7)


def test_identical_models_have_zero_divergence() -> None:
    logits = random_logits(2, 5, 40, seed=0, scale=100.0).bfloat16()
    assert vocab_parallel_kl(logits, logits.clone(), None).eq(0).all()


def test_masked_entries_contribute_nothing() -> None:
    logits = random_logits(1, 6, 20, seed=0)
    reference = random_logits(1, 6, 20, seed=1)
    targets = torch.arange(6).view(1, 6)
    expected_nll = vocab_parallel_token_nll(logits, targets, 0, None)
    expected_kl = vocab_parallel_kl(reference, logits, None)

    padding = torch.full((1, 6, 12), -torch.inf)
    padded, padded_reference = torch.cat([logits, padding], -1), torch.cat([reference, padding], -1)
    torch.testing.assert_close(vocab_parallel_token_nll(padded, targets, 0, None), expected_nll)
    torch.testing.assert_close(vocab_parallel_kl(padded_reference, padded, None), expected_kl)


def test_impossible_events_cost_infinity_and_unknown_targets_are_nan() -> None:
    logits = torch.tensor([[[0.0, -torch.inf, 1.0]]])
    reference = torch.zeros(1, 1, 3)
    assert vocab_parallel_token_nll(logits, torch.tensor([[1]]), 0, None).item() == math.inf
    assert vocab_parallel_kl(reference, logits, None).item() == math.inf
    assert vocab_parallel_kl(logits, reference, None).item() == pytest.approx(
        reference_kl(logits, reference).item()
    )
    for absent in (-100, 3):
        nll = vocab_parallel_token_nll(logits, torch.tensor([[absent]]), 0, None)
        assert nll.isnan().all()


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, 3e4 - 1, -3e4]]])
    nll = vocab_parallel_token_nll(logits, torch.tensor([[1]]), 0, None)
    assert nll.item() == pytest.approx(1 + math.log1p(math.exp(-1)), rel=1e-6)
    assert vocab_parallel_kl(logits, logits - 2e4, None).item() == 0.0


def test_one_hot_distributions() -> None:
    one_hot = torch.full((1, 4, 8), -torch.inf)
    one_hot[..., 3] = 5.0
    assert vocab_parallel_token_nll(one_hot, torch.full((1, 4), 3), 0, None).eq(0).all()
    uniform_cost = vocab_parallel_kl(one_hot, torch.zeros(1, 4, 8), None)
    torch.testing.assert_close(uniform_cost, torch.full((1, 4), math.log(8)))


def test_argmax_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[[1.0, 5.0, 5.0], [0.0, 0.0, 0.0], [-torch.inf] * 3]])
    assert vocab_parallel_argmax(logits, 0, None).tolist() == [[1, 0, 0]]
    with_nan = torch.tensor([[[1.0, 9.0, torch.nan]]])
    assert vocab_parallel_argmax(with_nan, 0, None).tolist() == [[2]]


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # [s, b, v] transposed, as Megatron's output layer leaves it: not contiguous.
    logits = random_logits(11, 3, 16, seed=0).transpose(0, 1)
    reference = random_logits(11, 3, 16, seed=1).transpose(0, 1)
    targets = torch.randint(16, (3, 11), generator=torch.Generator().manual_seed(2))
    nll = vocab_parallel_token_nll(logits, targets, 0, None)
    kl = vocab_parallel_kl(reference, logits, None)
    monkeypatch.setattr(metrics, "_TEMPORARY_ELEMENTS", 16 * 4)
    torch.testing.assert_close(
        vocab_parallel_token_nll(logits, targets, 0, None), nll, rtol=0, atol=0
    )
    torch.testing.assert_close(vocab_parallel_kl(reference, logits, None), kl, rtol=0, atol=0)


def test_inputs_are_left_as_they_were() -> None:
    logits, reference = random_logits(1, 4, 9, seed=0), random_logits(1, 4, 9, seed=1)
    copies = logits.clone(), reference.clone()
    vocab_parallel_token_nll(logits, torch.zeros(1, 4, dtype=torch.int64), 0, None)
    vocab_parallel_kl(reference, logits, None)
    vocab_parallel_argmax(logits, 0, None)
    assert torch.equal(logits, copies[0])
    assert torch.equal(reference, copies[1])


def test_accumulator_weighs_every_kept_token_the_same() -> None:
    accumulator = MetricAccumulator()
    accumulator.update(
        torch.tensor([[1.0, 2.0, torch.nan]]),
        kl=torch.tensor([[0.5, 0.1, torch.inf]]),
        agreement=torch.tensor([[True, False, True]]),
        mask=torch.tensor([[1.0, 1.0, 0.0]]),
    )
    accumulator.update(
        torch.tensor([[6.0]]), kl=torch.tensor([[0.3]]), agreement=torch.tensor([[True]])
    )
    result = accumulator.result()
    assert result["loss"] == pytest.approx(3.0)
    assert result["perplexity"] == pytest.approx(math.exp(3.0))
    assert result["kl"] == pytest.approx(0.3)
    assert result["agreement"] == pytest.approx(2 / 3)
    assert result["num_tokens"] == 3


def test_accumulator_without_reference_or_tokens() -> None:
    accumulator = MetricAccumulator()
    nothing = {"perplexity": None, "loss": None, "kl": None, "agreement": None, "num_tokens": 0}
    assert accumulator.result() == nothing
    accumulator.update(torch.tensor([[2.0]]), mask=torch.tensor([[False]]))
    assert accumulator.result() == nothing
    accumulator.update(torch.tensor([[2.0]]))
    assert accumulator.result() == {
        **nothing,
        "perplexity": math.exp(2.0),
        "loss": 2.0,
        "num_tokens": 1,
    }


def test_accumulator_does_not_hide_a_broken_model() -> None:
    overflowing, broken = MetricAccumulator(), MetricAccumulator()
    overflowing.update(torch.tensor([[1e4]]))
    assert overflowing.result()["perplexity"] == math.inf
    broken.update(torch.tensor([[torch.nan]]))
    assert math.isnan(broken.result()["perplexity"] or 0)
