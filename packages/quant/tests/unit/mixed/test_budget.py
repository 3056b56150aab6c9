"""The knapsack against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from slimtron_quant.mixed.budget import choose_formats

Layers = dict[str, dict[str, tuple[float, float]]]


def random_layers(seed: int, layers: int = 6) -> Layers:
    generator = random.Random(seed)
    return {
        f"layer{i}": {
            name: (bits * size, harm * generator.uniform(0.5, 2.0))
            for size in [generator.choice([64, 128, 256])]
            for name, bits, harm in (("a", 4.25, 1.0), ("b", 8.0, 0.1), ("c", 16.0, 0.0))
        }
        for i in range(layers)
    }


def total(layers: Layers, chosen: dict[str, str], index: int) -> float:
    return sum(layers[name][chosen[name]][index] for name in layers)


@pytest.mark.parametrize("seed", range(20))
def test_as_good_as_the_best_but_for_one_step(seed: int) -> None:
    layers = random_layers(seed)
    weights = sum(options["a"][0] / 4.25 for options in layers.values())
    budget = 6.5 * weights

    chosen = choose_formats(layers, budget)

    assert total(layers, chosen, 0) <= budget
    fitting = [
        total(layers, choice, 1)
        for formats in itertools.product("abc", repeat=len(layers))
        if total(layers, choice := dict(zip(layers, formats, strict=True)), 0) <= budget
    ]
    largest_step = max(options["a"][1] for options in layers.values())
    assert total(layers, chosen, 1) <= min(fitting) + largest_step
    uniform = total(layers, dict.fromkeys(layers, "a"), 1)
    assert total(layers, chosen, 1) < uniform


def test_all_the_bits_there_are_buy_everything() -> None:
    layers = random_layers(0)
    assert set(choose_formats(layers, 1e9).values()) == {"c"}


def test_a_format_that_is_larger_and_no_better_is_never_chosen() -> None:
    layers = {"layer": {"small": (4.0, 1.0), "worse": (8.0, 1.5), "large": (16.0, 0.0)}}
    assert choose_formats(layers, 8.0) == {"layer": "small"}
    assert choose_formats(layers, 16.0) == {"layer": "large"}


def test_the_layer_that_gains_most_per_bit_comes_first() -> None:
    options = {"small": (4.0, 1.0), "large": (8.0, 0.0)}
    layers = {"dull": options, "keen": {"small": (4.0, 2.0), "large": (8.0, 0.0)}}
    assert choose_formats(layers, 12.0) == {"dull": "small", "keen": "large"}
