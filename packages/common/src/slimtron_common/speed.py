"""How fast this machine multiplies, and what that makes of a job."""

from __future__ import annotations

import time

import torch

__all__ = ["measured_flops", "show_duration"]


def measured_flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product, from a fraction of a second."""
    size = 4096 if device == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    runs, start = 0, 0.0
    for attempt in range(6):
        if attempt == 1:
            # The first product warms up.
            start = _now(device)
        a @ a
        runs = attempt
    return 2.0 * size**3 * runs / (_now(device) - start)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show_duration(seconds: float) -> str:
    """Writes a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
