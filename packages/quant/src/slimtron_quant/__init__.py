"""Post-training quantization of Megatron-Core and NeMo 2 models, proved before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimtron_quant.__about__ import __version__
from slimtron_quant.config import ExportConfig, QuantizationConfig

if TYPE_CHECKING:
    from slimtron_quant.quantizer import Quantizer, calibration_loop

__all__ = [
    "ExportConfig",
    "QuantizationConfig",
    "Quantizer",
    "__version__",
    "calibration_loop",
]


def __getattr__(name: str) -> Any:
    # The quantizer needs torch, which a command's --help must not wait for.
    if name in __all__:
        from slimtron_quant import quantizer

        return getattr(quantizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
