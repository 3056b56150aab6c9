"""The linear layers that can be quantized, and which of them a config chooses for what."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from slimtron_common.errors import ConfigError
from slimtron_common.models.architecture import Architecture

__all__ = ["Choice", "choose", "quantizable_modules"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to become of one module, and why."""

    recipe: str | None
    """Name of the recipe; None to leave the module as it is."""

    reason: str = ""
    """The setting that decided; empty for the recipe of the whole model."""


def quantizable_modules(architecture: Architecture) -> list[str]:
    """Returns the names of the linear layers that can be quantized.

    They are Megatron-Core's, layers counted from 0 over all pipeline stages and experts over all
    processes.
    """
    from slimtron_common.models.linear import linear_layers

    return [layer.name for layer in linear_layers(architecture)]


def choose(
    modules: Sequence[str],
    recipe: str,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, str | None],
) -> dict[str, Choice]:
    """Chooses a recipe for every module.

    ``include`` limits all the rest, ``exclude`` wins over ``overrides``, and of two overrides
    the later one wins.

    Args:
        modules: Names of the modules.
        recipe: The recipe of those that no pattern names.
        include: Patterns of the only modules to quantize; none for all.
        exclude: Patterns of modules to leave as they are.
        overrides: Pattern to another recipe, or None to leave the modules as they are.

    Raises:
        ConfigError: A pattern matches no module.
    """
    chosen = {module: Choice(recipe) for module in modules}
    for pattern, other in overrides.items():
        for module in _matches(pattern, modules, f"overrides.{pattern}"):
            chosen[module] = Choice(other, f"overridden by {pattern}")
    for pattern in exclude:
        for module in _matches(pattern, modules, "exclude"):
            chosen[module] = Choice(None, f"excluded by {pattern}")
    if patterns := tuple(include):
        included = {m for pattern in patterns for m in _matches(pattern, modules, "include")}
        chosen |= {m: Choice(None, "not included") for m in modules if m not in included}
    return chosen


def _matches(pattern: str, modules: Sequence[str], where: str) -> list[str]:
    """Modules that a pattern matches, themselves or by a parent."""
    found = [m for m in modules if fnmatchcase(m, pattern) or fnmatchcase(m, f"{pattern}.*")]
    if not found:
        # The plain names twice: with the layer's number and, as most patterns are, without.
        candidates = {name for m in modules for name in (m, f"*.{m.rpartition('.')[2]}")}
        close = difflib.get_close_matches(pattern, sorted(candidates), n=3, cutoff=0.5)
        raise ConfigError(
            "the pattern matches no module that can be quantized",
            where=where,
            found=pattern,
            allowed=f"module names such as {modules[0]}, * for any characters",
            hint=f"did you mean {', '.join(close)}?" if close else None,
        )
    return found
