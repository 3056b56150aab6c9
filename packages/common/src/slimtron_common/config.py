"""Configs: YAML, flags and ``--set`` overrides become frozen dataclasses.

A config is a frozen dataclass of plain values and other such dataclasses. Its ``__post_init__``
checks ranges and raises `ConfigError` with ``where`` relative to itself (``where="seq_length"``);
`build_config` completes it to the path from the root (``data.seq_length``).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from slimtron_common.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["build_config", "fingerprint", "to_dict"]

T = TypeVar("T")

_ALLOWED = {
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
}


def build_config(
    cls: type[T],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] = MappingProxyType({}),
) -> T:
    """Builds a config from its defaults, a YAML file, flags and overrides, later ones winning.

    Values are never coerced, but for an integer where a float is meant: ``"1"``, ``1`` and
    ``true`` are three different things.

    Args:
        cls: A frozen dataclass, possibly of frozen dataclasses.
        file: A YAML file whose top level is a mapping.
        overrides: ``field.path=value``, the value in YAML.
        flags: Dotted field path to value; fields whose value is ``None`` are left alone.

    Returns:
        The config, checked.

    Raises:
        ConfigError: The file cannot be read, or a field is unknown, missing, of the wrong type or
            out of range.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import to_json

    tree = {} if file is None else _read(file)
    for path, value in flags.items():
        if value is not None:
            _assign(tree, path, value)
    for override in overrides:
        _assign(tree, *_parse_override(override))
    try:
        # JSON is the strict mode that still makes paths, enums and tuples of strings and lists. It
        # has no infinities: as strings they are refused like any other string.
        return TypeAdapter(cls).validate_json(
            to_json(tree, inf_nan_mode="strings"), strict=True, extra="forbid"
        )
    except ValidationError as error:
        raise _explain(error, cls, tree) from None


def to_dict(config: object) -> dict[str, Any]:
    """Returns a config dataclass as JSON values, its fields in the order of their definition."""
    from pydantic_core import to_jsonable_python

    values: dict[str, Any] = to_jsonable_python(config)
    return values


def fingerprint(values: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hexadecimal) of JSON values, whatever the order of their keys."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    from slimtron_common.yaml_loader import load_yaml

    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError("cannot be read", where=file, found=error.strerror) from error
    tree = load_yaml(content, where=str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            "does not hold a config", where=file, found=_show(tree), allowed="`field: value` lines"
        )
    return tree


def _parse_override(override: str) -> tuple[str, object]:
    from slimtron_common.yaml_loader import load_yaml

    path, equals, value = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ConfigError(
            "is not an override", where="--set", found=_show(override), allowed="field.path=value"
        )
    return path, load_yaml(value, where=f"--set {path}")


def _assign(tree: dict[str, Any], path: str, value: object) -> None:
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents):
        child = tree.get(parent)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(
                f"is not a mapping, so {path} cannot be set",
                where=".".join(parents[: depth + 1]),
                found=_show(child),
            )
        # A copy, for a YAML alias makes two fields share one mapping.
        tree[parent] = tree = dict(child or {})
    tree[name] = value


def _explain(error: ValidationError, cls: type, tree: object) -> ConfigError:
    """Returns the first thing wrong as a ConfigError; unknown fields go first, as typing errors."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    where = _locate(first["loc"], tree)
    match first["type"]:
        case "unexpected_keyword_argument":
            return _unknown_field(cls, where)
        case "missing":
            where = f"{where}.{first['loc'][-1]}".lstrip(".")
            return ConfigError("is required", where=where, hint=f"set it: --set {where}=VALUE")
        case "value_error":
            cause = first["ctx"]["error"]
            if not isinstance(cause, ConfigError):
                return ConfigError(str(cause), where=where or None, found=_show(first["input"]))
            cause.where = ".".join(str(part) for part in (where, cause.where) if part) or None
            return cause
    allowed = dict.fromkeys(
        _ALLOWED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
        for problem in problems
        if _locate(problem["loc"], tree) == where
    )
    return ConfigError(
        "is not valid",
        where=where,
        found=_show(first["input"]),
        allowed=" or ".join(allowed),
    )


def _locate(loc: Sequence[int | str], tree: object) -> str:
    """Returns the dotted path of a value, without pydantic's names for the members of unions."""
    node: Any = tree
    parts = []
    for part in loc:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _unknown_field(cls: type, where: str) -> ConfigError:
    *parents, name = where.split(".")
    parent = "".join(f"{part}." for part in parents if not part.isdigit())
    paths = list(_field_paths(cls))
    siblings = [
        path.removeprefix(parent)
        for path in paths
        if path.startswith(parent) and "." not in path.removeprefix(parent)
    ]
    for pool in (siblings, paths):
        by_name = {path.rpartition(".")[2]: path for path in reversed(pool)}
        for close in difflib.get_close_matches(name, by_name, n=1):
            return ConfigError("unknown", where=where, hint=f"did you mean {by_name[close]}?")
    return ConfigError("unknown", where=where, allowed=", ".join(siblings) or None)


def _field_paths(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield prefix + field.name
        for hint in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(hint, type) and is_dataclass(hint):
                yield from _field_paths(hint, f"{prefix}{field.name}.")


def _show(value: object) -> str:
    """Returns a value as a short line, strings in quotes: ``'1'`` is not ``1``."""
    return reprlib.repr(value)
