"""The number formats against lists of all their numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimtron_quant.formats.codes import (
    block_amax,
    e2m1_from_codes,
    e4m3,
    e8m0_codes,
    e8m0_from_codes,
    pack_pairs,
    to_e2m1_codes,
    unpack_pairs,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = sorted(
    {m / 8 * 2.0**-6 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)


def nearest(x: Tensor, numbers: list[float]) -> Tensor:
    """Nearest number in float64, the one of even index where two are as near."""
    grid = torch.tensor(numbers, dtype=torch.float64)
    distance = (x.double().abs().clamp(max=grid[-1])[:, None] - grid).abs()
    even_first = [*range(0, len(grid), 2), *range(1, len(grid), 2)]
    index = torch.tensor(even_first)[distance[:, even_first].argmin(1)]
    return grid[index].copysign(x.double())


def probes(numbers: list[float]) -> Tensor:
    """The numbers, what lies half-way between them, and the neighbours of both in float32."""
    grid = torch.tensor(numbers)
    middles = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, middles, torch.tensor([numbers[-1] * 1.5, 1e30])])
    around = [points, *(torch.nextafter(points, torch.tensor(end)) for end in (0.0, math.inf))]
    positive = torch.cat([*around, torch.rand(5000) * numbers[-1] * 1.1])
    return torch.cat([positive, -positive])


def test_e2m1_rounds_to_nearest_even_and_saturates() -> None:
    x = probes(E2M1)
    codes = to_e2m1_codes(x)
    assert codes.dtype == torch.uint8
    assert codes.max() == 15
    assert torch.equal(e2m1_from_codes(codes).double(), nearest(x, E2M1))
    assert torch.equal(codes >= 8, x < 0)


def test_e2m1_has_sixteen_codes() -> None:
    values = e2m1_from_codes(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == [*E2M1, *(-v for v in E2M1)]
    assert to_e2m1_codes(values[:8]).tolist() == list(range(8))


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    x = probes(E4M3)
    assert len(E4M3) == 127
    assert torch.equal(e4m3(x).double(), nearest(x, E4M3))


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_powers_of_two_are_the_smallest_that_fit(largest: float) -> None:
    edges = torch.tensor([largest * 2.0**e for e in range(-140, 119)])
    amax = torch.cat(
        [
            edges,
            torch.nextafter(edges, torch.tensor(math.inf)),
            torch.nextafter(edges, torch.tensor(0.0)),
            torch.rand(1000) * 10.0 ** torch.randint(-38, 38, (1000,)),
            torch.tensor([0.0, 2.0**-149, torch.finfo(torch.float32).max]),
        ]
    )
    codes = e8m0_codes(amax, largest)
    exact = amax.double() / largest
    expected = []
    for value in exact.tolist():
        exponent = -127
        while exponent < 127 and 2.0**exponent < value:
            exponent += 1
        expected.append(exponent + 127)
    assert codes.tolist() == expected
    assert torch.equal(e8m0_from_codes(codes).double(), 2.0 ** (codes.double() - 127))


def test_every_e8m0_code() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    expected = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(e8m0_from_codes(codes), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_pairs(dim: int) -> None:
    codes = torch.randint(0, 16, (6, 8), dtype=torch.uint8)
    packed = pack_pairs(codes, dim)
    assert packed.shape == ((3, 8) if dim == 0 else (6, 4))
    second = codes[1, 0] if dim == 0 else codes[0, 1]
    assert int(packed[0, 0]) == int(codes[0, 0]) + 16 * int(second)
    assert torch.equal(unpack_pairs(packed, dim), codes)


def test_block_amax() -> None:
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = [block.float().abs().amax(-1) for block in x.split(16, -1)]
    assert torch.equal(block_amax(x, 16), torch.stack(expected, -1))
