"""How far two hidden states are apart, token by token.

Legend: ``s`` sequence, ``b`` micro-batch, ``h`` hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine_loss", "mse_loss"]


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 less the cosine of the angle between two vectors.

    Computed as half the squared distance of the two at length 1, which is the same and, unlike
    the difference, exactly 0 with a gradient of 0 for vectors that are equal.

    Args:
        student: ``[s, b, h]``, any floating dtype.
        teacher: ``[s, b, h]``.

    Returns:
        ``[s, b]`` fp32, from 0 to 2. 0.5 where one vector is zero, 0 where both are.
    """
    # The bound on lengths is also one on gradients.
    student, teacher = (F.normalize(x.float(), dim=-1, eps=1e-6) for x in (student, teacher))
    return (student - teacher).square().sum(-1) / 2


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over channels of the squared difference.

    Args:
        student: ``[s, b, h]``, any floating dtype.
        teacher: ``[s, b, h]``.

    Returns:
        ``[s, b]`` fp32.
    """
    return (student.float() - teacher.float()).square().mean(-1)
