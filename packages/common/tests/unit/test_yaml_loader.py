from __future__ import annotations

import pytest

from slimtron_common.errors import ConfigError
from slimtron_common.yaml_loader import load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("0", 0),
        ("-12", -12),
        ("1_000_000", 1_000_000),
        ("1e-5", 1e-5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("2.5E+3", 2500.0),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("'1'", "1"),
        ("fp8", "fp8"),
        ("e5", "e5"),
        ("[1, [a]]", [1, ["a"]]),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    loaded = load_yaml(text, where="x")
    assert loaded == value
    assert type(loaded) is type(value)


def test_merge_keys_work_and_may_be_overridden() -> None:
    text = "x: {y: &b {<<: &a {p: 1}, p: 2}}\nz: {<<: *b, q: 3}"
    assert load_yaml(text, where="x") == {"x": {"y": {"p": 2}}, "z": {"p": 2, "q": 3}}
    several = "x: &a {p: 1, q: 1}\ny: &b {p: 2, r: 2}\nz: {<<: [*a, *b], q: 3}"
    assert load_yaml(several, where="x")["z"] == {"p": 1, "q": 3, "r": 2}
    with pytest.raises(ConfigError, match="only mappings can be merged"):
        load_yaml("x: {<<: 3}", where="x")


@pytest.mark.parametrize(
    ("text", "problem", "where"),
    [
        ("a: 1\nb: 2\na: 3", "'a' appears twice", "f.yaml line 3, column 1"),
        ("a: 1\nb: {c: 1, c: 2}", "'c' appears twice", "f.yaml line 2, column 11"),
        ("a:\n  1: x", "a key must be a string", "f.yaml line 2, column 3"),
        ("a: [1, 2\nb: 1", "expected ',' or ']'", "f.yaml line 2, column 2"),
        ("a: !!python/object/apply:os.system [echo]", "constructor", "f.yaml line 1, column 4"),
        ("a: *b", "undefined alias", "f.yaml line 1, column 4"),
        ("--- 1\n--- 2", "another document", "f.yaml line 2, column 1"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, problem: str, where: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_yaml(text, where="f.yaml")
    assert caught.value.where == where


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(b"a: \xff\xfe\xfa", where="f.yaml")
