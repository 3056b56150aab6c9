"""How quantized weights lie on disk: encoding them, and decoding without ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from slimtron_common.errors import ConfigError
from slimtron_quant.formats.base import Calibration, Format
from slimtron_quant.formats.fp8 import BlockFp8, Fp8, Fp8PerChannel
from slimtron_quant.formats.int4 import W4A8, Int4
from slimtron_quant.formats.int8 import Int8
from slimtron_quant.formats.mx import Mxfp4, Mxfp8
from slimtron_quant.formats.nvfp4 import Nvfp4, Nvfp4WeightOnly

__all__ = ["FORMATS", "Calibration", "Format", "format_named"]

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Fp8("fp8"),
            Fp8PerChannel("fp8_pc_pt"),
            BlockFp8("block_fp8"),
            Int8("int8"),
            Int4("int4"),
            W4A8("w4a8_awq"),
            Nvfp4("nvfp4"),
            Nvfp4WeightOnly("w4a16_nvfp4"),
            Mxfp4("mxfp4"),
            Mxfp8("mxfp8"),
        )
    }
)


def format_named(name: str) -> Format:
    """Returns a format.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in FORMATS:
        raise ConfigError("no such format", found=name, allowed=", ".join(FORMATS))
    return FORMATS[name]
