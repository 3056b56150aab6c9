"""YAML for configs: safe, and without the surprises of YAML 1.1.

``no`` and ``on`` are strings, ``1e-5`` is a number, ``12:30`` is not; a key that appears twice or
is no string is an error. Imports PyYAML, so the commands import this module when they read one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from slimtron_common.errors import ConfigError

__all__ = ["load_yaml"]


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag != "tag:yaml.org,2002:str":
                problem = "a key must be a string: quote it"
            elif key.value in seen:
                problem = f"the key {key.value!r} appears twice"
            else:
                seen.add(key.value)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # PyYAML 6.0.4 lets the value that is merged win over the one that overrides it.
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                continue
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            # The first of several wins.
            for source in reversed(sources):
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(
                        problem="only mappings can be merged", problem_mark=value.start_mark
                    )
                self.flatten_mapping(source)
                merged |= {pair[0].value: pair for pair in source.value}
        merged |= {pair[0].value: pair for pair in node.value if pair[0].tag != _MERGE}
        node.value = list(merged.values())


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def load_yaml(content: str | bytes, *, where: str) -> Any:
    """Returns the values of a YAML document.

    Args:
        content: The document; bytes are UTF-8.
        where: What it is, for the error: a file's path or a flag.

    Raises:
        ConfigError: The document is not YAML of plain values, or repeats a key; names the line.
    """
    try:
        return yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"is not valid YAML: {error.problem}", where=f"{where}{line}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {error}", where=where) from error
