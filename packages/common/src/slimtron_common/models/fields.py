"""Single fields of a ``config.json``, read with their type.

Each raises ``CheckpointError`` for a missing field or one of another type; ``source`` is the path
of the file, for messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimtron_common.errors import CheckpointError

__all__ = ["flag", "integer", "number"]


def integer(
    config: Mapping[str, Any],
    name: str,
    source: str,
    *,
    default: int | None = None,
    minimum: int = 1,
) -> int:
    """Reads an integer; an absent or null one is ``default``, if there is one."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(
            f"{name} must be an integer of {minimum} or more", where=source, found=repr(value)
        )
    return value


def number(
    config: Mapping[str, Any], name: str, source: str, *, default: float | None = None
) -> float:
    """Reads a positive number; an absent or null one is ``default``, if there is one."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{name} must be a positive number", where=source, found=repr(value))
    return float(value)


def flag(config: Mapping[str, Any], name: str, source: str, *, default: bool = False) -> bool:
    """Reads true or false; an absent or null one is ``default``."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} must be true or false", where=source, found=repr(value))
    return value
