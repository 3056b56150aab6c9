from __future__ import annotations

import pytest

from slimtron_common.errors import ConfigError
from slimtron_quant.recipes.modules import Choice, choose

MODULES = [
    f"decoder.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
]


def chosen(**patterns: object) -> dict[str, str | None]:
    settings: dict[str, object] = {"overrides": {}, **patterns}
    return {m: c.recipe for m, c in choose(MODULES, "fp8", **settings).items()}  # type: ignore[arg-type]


def test_without_patterns_all_get_the_recipe() -> None:
    assert set(choose(MODULES, "fp8", overrides={}).values()) == {Choice("fp8")}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*.linear_fc2", 12),
        ("decoder.layers.1", 3),
        ("decoder.layers.1[01].mlp.*", 4),
        ("decoder.layers.0.mlp", 2),
        ("*", 36),
    ],
)
def test_a_pattern_covers_modules_and_what_is_inside(pattern: str, count: int) -> None:
    assert list(chosen(exclude=[pattern]).values()).count(None) == count
    assert list(chosen(include=[pattern]).values()).count("fp8") == count
    assert list(chosen(overrides={pattern: "int4"}).values()).count("int4") == count


def test_precedence() -> None:
    found = choose(
        MODULES,
        "fp8",
        include=["*.mlp"],
        exclude=["decoder.layers.0"],
        overrides={"*.linear_fc2": "int4", "decoder.layers.[01]": "int8", "decoder.layers.2": None},
    )
    assert found["decoder.layers.0.mlp.linear_fc2"] == Choice(None, "excluded by decoder.layers.0")
    assert found["decoder.layers.1.mlp.linear_fc2"] == Choice(
        "int8", "overridden by decoder.layers.[01]"
    )
    assert found["decoder.layers.2.mlp.linear_fc1"] == Choice(
        None, "overridden by decoder.layers.2"
    )
    assert found["decoder.layers.3.mlp.linear_fc2"].recipe == "int4"
    assert found["decoder.layers.3.mlp.linear_fc1"] == Choice("fp8")
    assert found["decoder.layers.1.self_attention.linear_qkv"] == Choice(None, "not included")


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ({"exclude": ["*.linear_fc3"]}, "exclude"),
        ({"include": ["*.linear_fc3"]}, "include"),
        ({"overrides": {"*.linear_fc3": "int4"}}, "overrides.*.linear_fc3"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(setting: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError, match="matches no module") as error:
        chosen(**setting)
    assert error.value.where == where
    assert error.value.found == "*.linear_fc3"
    assert "*.linear_fc1" in str(error.value.hint)
    assert "*.linear_fc2" in str(error.value.hint)


@pytest.mark.parametrize("pattern", ["model.layers.0", "decoder.layers.12", "nonsense"])
def test_near_misses(pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(exclude=[pattern])
    assert "decoder.layers." in str(error.value)
