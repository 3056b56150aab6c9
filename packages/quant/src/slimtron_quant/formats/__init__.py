"""How quantized weights lie on disk: encoding them, and decoding without ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from slimtron_common.errors import ConfigError
from slimtron_quant.formats.base import Format
from slimtron_quant.formats.fp8 import Fp8
from slimtron_quant.formats.int4 import Int4
from slimtron_quant.formats.int8 import Int8

__all__ = ["FORMATS", "Format", "format_named"]

FORMATS: Mapping[str, Format] = MappingProxyType(
    {fmt.name: fmt for fmt in (Fp8("fp8"), Int8("int8"), Int4("int4"))}
)


def format_named(name: str) -> Format:
    """Returns a format.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in FORMATS:
        raise ConfigError("no such format", found=name, allowed=", ".join(FORMATS))
    return FORMATS[name]
