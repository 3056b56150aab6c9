from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from slimtron_common.config import build_config, fingerprint, to_dict
from slimtron_common.errors import ConfigError


class Algorithm(enum.Enum):
    MAX = "max"
    AWQ = "awq"


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq:
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(
                "must be positive", where="block_size", found=self.block_size, allowed=">= 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    pattern: str
    bits: Literal[4, 8] = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Quant:
    algorithm: Algorithm = Algorithm.MAX
    awq: Awq = field(default_factory=Awq)
    rules: tuple[Rule, ...] = ()
    groups: dict[str, Awq] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    model: Path
    quant: Quant = field(default_factory=Quant)
    num_tokens: int | None = None
    alpha: float = 0.5
    resume: bool = False
    name: str = "run"
    exclude: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    layers: int | Literal["all"] = "all"
    fallback: Awq | None = None

    def __post_init__(self) -> None:
        if self.resume and self.name == "run":
            raise ConfigError("resume needs a name")
        if self.alpha > 1:
            raise ValueError("alpha is above 1")


def build(text: str = "", *overrides: str, **flags: object) -> Job:
    flags.setdefault("model", "m")
    return build_config(Job, overrides=[*overrides], flags={**_parse(text), **flags})


def _parse(text: str) -> Mapping[str, Any]:
    import yaml

    return yaml.safe_load(text) or {}


def refusal(text: str = "", *overrides: str, **flags: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(text, *overrides, **flags)
    return caught.value


def test_defaults_are_those_of_the_dataclass() -> None:
    assert build() == Job(model=Path("m"))


def test_every_supported_type(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        """
model: /models/a
quant:
  algorithm: awq
  awq: {block_size: 64}
  rules: [{pattern: "*.mlp.*", bits: 4}, {pattern: head}]
  groups: {a: {block_size: 16}}
num_tokens: 4096
alpha: 1
resume: false
exclude: [head, "*.0.*"]
limits: {kl: 1e-3}
layers: 3
fallback: {}
"""
    )
    job = build_config(Job, file=file)
    assert job == Job(
        model=Path("/models/a"),
        quant=Quant(
            algorithm=Algorithm.AWQ,
            awq=Awq(block_size=64),
            rules=(Rule(pattern="*.mlp.*", bits=4), Rule(pattern="head")),
            groups={"a": Awq(block_size=16)},
        ),
        num_tokens=4096,
        alpha=1.0,
        exclude=("head", "*.0.*"),
        limits={"kl": 0.001},
        layers=3,
        fallback=Awq(),
    )
    assert isinstance(job.alpha, float)
    assert isinstance(job.exclude, tuple)


def test_flags_and_overrides_win_over_the_file_and_none_leaves_it_alone(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: a\nnum_tokens: 1\nname: x\nquant: {awq: {block_size: 8}}")
    job = build_config(
        Job,
        file=file,
        flags={"num_tokens": 2, "name": None, "quant.algorithm": "awq", "alpha": 0.25},
        overrides=["quant.awq.block_size=32", "alpha=0.75", "exclude=[a, b]", "limits.kl=1"],
    )
    assert (job.num_tokens, job.name, job.alpha) == (2, "x", 0.75)
    assert job.quant == Quant(algorithm=Algorithm.AWQ, awq=Awq(block_size=32))
    assert (job.exclude, job.limits) == (("a", "b"), {"kl": 1.0})


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: a\nquant: {awq: &awq {block_size: 8}}\nfallback: *awq")
    job = build_config(Job, file=file, overrides=["fallback.block_size=4"])
    assert (job.quant.awq.block_size, job.fallback) == (8, Awq(block_size=4))


@pytest.mark.parametrize(
    ("override", "where", "found", "allowed"),
    [
        ("num_tokens='1'", "num_tokens", "'1'", "a valid integer"),
        ("num_tokens=true", "num_tokens", "True", "a valid integer"),
        ("num_tokens=1e3", "num_tokens", "1000.0", "a valid integer"),
        ("alpha=true", "alpha", "True", "a valid number"),
        ("alpha=.nan", "alpha", "'.nan'", "a valid number"),
        ("alpha=", "alpha", "None", "a valid number"),
        ("resume=1", "resume", "1", "a valid boolean"),
        ("resume=yes", "resume", "'yes'", "a valid boolean"),
        ("name=1", "name", "1", "a valid string"),
        ("exclude=head", "exclude", "'head'", "a list"),
        ("exclude=[head, 2]", "exclude.1", "2", "a valid string"),
        ("limits=[1]", "limits", "[1]", "a mapping"),
        ("limits={kl: low}", "limits.kl", "'low'", "a valid number"),
        ("quant=fp8", "quant", "'fp8'", "a mapping"),
        ("quant.algorithm=gptq", "quant.algorithm", "'gptq'", "'max' or 'awq'"),
        ("quant.rules=[{pattern: a, bits: 5}]", "quant.rules.0.bits", "5", "4 or 8"),
        ("layers=[1]", "layers", "[1]", "a valid integer or 'all'"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(
    override: str, where: str, found: str, allowed: str
) -> None:
    error = refusal("", override)
    assert (error.where, error.found, error.allowed) == (where, found, allowed)


def test_a_flag_that_is_not_finite_is_refused() -> None:
    assert refusal(alpha=float("nan")).where == "alpha"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("quant.awq.block_size=0", "quant.awq.block_size"),
        ("fallback.block_size=0", "fallback.block_size"),
        ("quant.groups={a: {block_size: 0}}", "quant.groups.a.block_size"),
    ],
)
def test_a_range_error_of_a_nested_config_gets_the_whole_path(override: str, where: str) -> None:
    error = refusal("", override)
    assert str(error) == f"{where}: must be positive\n  found: 0\n  allowed: >= 1"


def test_an_error_of_the_whole_config_has_no_path() -> None:
    assert str(refusal("", "resume=true")) == "resume needs a name"
    assert str(refusal("", "alpha=2")).startswith("alpha is above 1")


@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("num_token=1", "num_token", "did you mean num_tokens?"),
        ("quant.awq.block_sz=1", "quant.awq.block_sz", "did you mean block_size?"),
        ("quant.rules=[{patern: a}]", "quant.rules.0.patern", "did you mean pattern?"),
        ("block_size=1", "block_size", "did you mean quant.awq.block_size?"),
    ],
)
def test_an_unknown_field_gets_a_suggestion(override: str, where: str, hint: str) -> None:
    error = refusal("", override)
    assert (error.where, error.message, error.hint) == (where, "unknown", hint)


def test_an_unknown_field_like_no_other_lists_the_known_ones() -> None:
    error = refusal("", "quant.zzz=1")
    assert error.hint is None
    assert error.allowed == "algorithm, awq, rules, groups"


def test_a_missing_field_is_named_but_a_misspelt_one_comes_first() -> None:
    error = refusal("", "quant.rules=[{}]")
    assert (error.where, error.message) == ("quant.rules.0.pattern", "is required")
    assert refusal("", "quant.rules=[{patern: a}]").where == "quant.rules.0.patern"


@pytest.mark.parametrize("override", ["", "name", "=1", "a..b=1", ".a=1"])
def test_a_malformed_override_is_refused(override: str) -> None:
    assert refusal("", override).where == "--set"


def test_an_override_cannot_enter_a_value() -> None:
    error = refusal("name: x", "name.a.b=1")
    assert (error.where, error.found) == ("name", "'x'")


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        build_config(Job, file=tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        build_config(Job, file=tmp_path)
    file = tmp_path / "list.yaml"
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="does not hold a config"):
        build_config(Job, file=file)
    file.write_text("# nothing\n")
    assert build_config(Job, file=file, flags={"model": Path("m")}) == Job(model=Path("m"))


def test_to_dict_is_json_and_builds_the_same_config(tmp_path: Path) -> None:
    job = build("", "quant.rules=[{pattern: a}]", "quant.algorithm=awq", "limits={b: 1, a: 2}")
    values = to_dict(job)
    assert list(values)[:3] == ["model", "quant", "num_tokens"]
    assert (values["model"], values["quant"]["algorithm"]) == ("m", "awq")
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(values))
    assert build_config(Job, file=file) == job


def test_fingerprint_is_of_the_values_and_not_their_order() -> None:
    # printf '{"a":[1,2.5],"b":"é"}' | sha256sum
    expected = "2071e5952e3110d79f01f374bf90abe7fc01cf116fd0a40af0ab60d3f9a99f8d"
    assert fingerprint({"b": "é", "a": [1, 2.5]}) == expected
    assert fingerprint({"a": [1, 2.5], "b": "é"}) == expected
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
