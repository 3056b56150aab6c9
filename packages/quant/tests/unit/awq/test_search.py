from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtron_quant.awq.search import (
    InputStatistics,
    candidate_scales,
    weight_magnitude,
)
from slimtron_quant.awq.shard import Shard

WHOLE = Shard()
ALPHAS = [step / 10 for step in range(11)]


def inputs(num_tokens: int, in_features: int) -> Tensor:
    """Channels of very different size around a common mean, as a transformer's are."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-2, 1.5, in_features)[torch.randperm(in_features, generator=generator)]
    return (torch.randn(num_tokens, in_features, generator=generator) + 0.5) * size


def weights(out_features: int, in_features: int) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)) * 0.1


def int4(weight: Tensor, block_size: int) -> Tensor:
    blocks = weight.view(weight.shape[0], -1, block_size)
    step = blocks.abs().amax(-1, keepdim=True) / 7
    return ((blocks / step).round().clamp(-7, 7) * step).view_as(weight)


def statistics_of(*batches: Tensor) -> InputStatistics:
    statistics = InputStatistics(batches[0].shape[1], WHOLE, torch.device("cpu"))
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_losses_equal_a_replay_of_the_inputs() -> None:
    x, weight = inputs(500, 96), weights(40, 96)
    statistics = statistics_of(*x.split(64))
    magnitude = weight_magnitude(weight, 16, WHOLE)
    errors = [
        int4(weight * scale, 16) / scale - weight
        for scale in candidate_scales(statistics.mean_magnitude, magnitude, ALPHAS)
    ]

    correlations = statistics.correlations(torch.float32)
    losses = [correlations.energy(error * correlations.norms).item() for error in errors]

    replayed = [(x.double() @ error.double().T).square().sum().item() for error in errors]
    # fp32 sums of 500 products of numbers that span seven orders of magnitude.
    assert losses == pytest.approx(replayed, rel=1e-5)
    assert losses.index(min(losses)) == replayed.index(min(replayed))
    assert 0 < losses.index(min(losses)) < 10, "neither end of the range may win by default"


def test_bfloat16_correlations_rank_the_candidates_as_exact_ones() -> None:
    x, weight = inputs(2000, 256), weights(512, 256)
    statistics = statistics_of(x)
    magnitude = weight_magnitude(weight, 16, WHOLE)
    errors = [
        int4(weight * scale, 16) / scale - weight
        for scale in candidate_scales(statistics.mean_magnitude, magnitude, ALPHAS)
    ]
    exact = [(x.double() @ error.double().T).square().sum().item() for error in errors]

    correlations = statistics.correlations(torch.bfloat16)

    losses = [correlations.energy(error * correlations.norms).item() for error in errors]
    assert losses == pytest.approx(exact, rel=3e-4)
    assert losses.index(min(losses)) == exact.index(min(exact))


def test_statistics_do_not_depend_on_the_batches() -> None:
    x = inputs(60, 16)
    once, cut = statistics_of(x), statistics_of(*x.split([7, 1, 52]))
    # The order of fp32 additions differs.
    torch.testing.assert_close(cut.moment, once.moment, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cut.mean_magnitude, x.abs().mean(0))
    assert cut.num_tokens == once.num_tokens == 60


def test_statistics_of_half_precision_inputs_are_sums_of_exact_products() -> None:
    x = inputs(300, 16).bfloat16()
    statistics = statistics_of(x)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(statistics.moment.double(), exact, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(statistics.mean_magnitude.double(), x.double().abs().mean(0))


def test_without_tokens_everything_is_zero() -> None:
    statistics = InputStatistics(8, WHOLE, torch.device("cpu"))
    assert statistics.mean_magnitude.tolist() == [0.0] * 8
    assert statistics.correlations(torch.float32).energy(weights(4, 8)) == 0


@pytest.mark.parametrize("block_size", [4, 5, 12, None])
def test_weight_magnitude_is_relative_to_the_block(block_size: int | None) -> None:
    weight = weights(6, 12)
    size = block_size or 12
    expected = []
    for channel in range(12):
        start = channel // size * size
        block = weight[:, start : start + size].abs()
        expected.append((weight[:, channel].abs() / block.amax(1)).mean())
    torch.testing.assert_close(weight_magnitude(weight, block_size, WHOLE), torch.stack(expected))


def test_candidates_follow_the_formula() -> None:
    x, w = inputs(50, 24).abs().mean(0), weights(8, 24).abs().mean(0)
    unscaled, *scales = candidate_scales(x, w, [None, *ALPHAS])
    assert unscaled.tolist() == [1.0] * 24
    for alpha, scale in zip(ALPHAS, scales, strict=True):
        raw = x.double() ** alpha / w.double() ** (1 - alpha)
        expected = raw / (raw.max() * raw.min()).sqrt()
        torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_dead_channels_get_finite_scales(alpha: float) -> None:
    x, w = torch.tensor([0.0, 0.0, 1.0, 1e6]), torch.tensor([0.0, 1.0, 0.0, 1e-6])
    (scale,) = candidate_scales(x, w, [alpha])
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_whole_weight_is_a_shard_of_one(dim: int) -> None:
    shard = Shard(dim)
    weight = weights(4, 6)
    assert (shard.size, shard.part(6)) == (1, slice(0, 6))
    assert shard.gather(weight, dim) is weight
