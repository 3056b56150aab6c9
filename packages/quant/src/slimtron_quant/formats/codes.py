"""The number formats that codes and scales are stored in, and how they are grouped and packed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "block_amax",
    "e2m1_from_codes",
    "e4m3",
    "e8m0_codes",
    "e8m0_from_codes",
    "pack_pairs",
    "to_blocks",
    "to_e2m1_codes",
    "unpack_pairs",
]

E2M1_MAX = 6.0
E4M3_MAX = 448.0

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_LIMITS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Half-way between neighbours. A number there goes to the even code: down to 0, 2, 4 and 6."""


def e4m3(x: Tensor) -> Tensor:
    """Rounds to E4M3, ties to even; what exceeds the range saturates."""
    # The conversion makes NaN of what exceeds the range: it has no infinity to saturate to.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1_codes(x: Tensor) -> Tensor:
    """Rounds to E2M1, ties to even; what exceeds the range saturates.

    Args:
        x: Any shape, float32.

    Returns:
        Codes 0 to 15 as uint8, the sign in bit 3.
    """
    limits = torch.tensor(_E2M1_LIMITS, device=x.device)
    # Every second limit belongs to the code above it.
    limits[1::2] = torch.nextafter(limits[1::2], limits.new_zeros(()))
    magnitude = torch.bucketize(x.abs(), limits, out_int32=True)
    return (magnitude + 8 * (x < 0)).to(torch.uint8)


def e2m1_from_codes(codes: Tensor) -> Tensor:
    """The float32 numbers that E2M1 codes (0 to 15) stand for."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    return table[codes.int()]


def e8m0_codes(amax: Tensor, largest: float) -> Tensor:
    """Smallest power of two by which ``amax`` divided is no larger than ``largest``.

    Args:
        amax: Largest magnitudes, finite and not negative.
        largest: Largest number of the format that is scaled.

    Returns:
        The exponent plus 127 as uint8, 0 where ``amax`` is zero.
    """
    fraction, exponent = torch.frexp(amax.float())
    top, top_exponent = math.frexp(largest)
    # Compared rather than divided: a quotient may be rounded onto a power of two.
    ceiling = exponent - top_exponent + (fraction > top).int()
    return torch.where(amax > 0, ceiling, -127).clamp(-127, 127).add(127).to(torch.uint8)


def e8m0_from_codes(codes: Tensor) -> Tensor:
    """The powers of two that E8M0 codes (0 to 254) stand for, exact float32."""
    return torch.where(codes == 0, 2.0**-127, (codes.int() << 23).view(torch.float32))


def to_blocks(x: Tensor, size: int) -> Tensor:
    """Cuts the last dimension: ``[..., n]`` to float32 ``[..., n / size, size]``."""
    return x.detach().float().reshape(*x.shape[:-1], -1, size)


def block_amax(x: Tensor, size: int) -> Tensor:
    """Largest magnitude of each block along the last dimension: float32 ``[..., n / size]``."""
    return to_blocks(x, size).abs().amax(-1)


def pack_pairs(codes: Tensor, dim: int) -> Tensor:
    """Packs 4-bit codes along a dimension, the even one in a byte's low half.

    Args:
        codes: ``[rows, columns]`` uint8, bits 4 to 7 zero.
        dim: 0 or 1, of even size.
    """
    even, odd = slice(0, None, 2), slice(1, None, 2)
    low, high = (codes[even], codes[odd]) if dim == 0 else (codes[:, even], codes[:, odd])
    return low | (high << 4)


def unpack_pairs(packed: Tensor, dim: int) -> Tensor:
    """Undoes ``pack_pairs``."""
    return torch.stack([packed & 0xF, packed >> 4], dim + 1).flatten(dim, dim + 1)
