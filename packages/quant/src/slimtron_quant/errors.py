"""Errors of quantization alone; the rest are ``slimtron_common.errors``."""

from __future__ import annotations

from slimtron_common.errors import SlimtronError

__all__ = ["CalibrationError"]


class CalibrationError(SlimtronError):
    """Calibration left a quantizer without a scale that can be used."""

    exit_code = 1
