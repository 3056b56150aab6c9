"""The interface of a format, and the arithmetic that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtron_common.errors import CheckpointError
from slimtron_quant.errors import CalibrationError

__all__ = ["SMALLEST_AMAX", "VANISHING_AMAX", "Format", "scales", "take"]

VANISHING_AMAX = 2.0**-24
"""ModelOpt quantizes everything whose amax is no larger than this to zero."""

SMALLEST_AMAX = 2.0**-23
"""The smallest amax worth having: a power of two, so exact in every float type, and far
enough above zero that no format's scale is subnormal in float32."""


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """How a linear layer's weight lies on disk, in ModelOpt's unified checkpoint layout.

    A layer's tensors are named by suffix: ``weight`` (the codes), ``weight_scale``, where the
    format quantizes activations ``input_scale``, and ``pre_quant_scale`` where the input is
    multiplied by one before it is quantized. A weight is its code times its scale.

    Packing reproduces ModelOpt's fake quantization code by code. A weight that went through
    it already packs to the same codes, so packing ``quantizer(weight)`` is exact for every
    algorithm and device.
    """

    name: str
    """Slimtron's name of the format, that of its recipe."""

    quant_algo: ClassVar[str]
    """ModelOpt's name of the layout, by which inference engines choose their kernels."""

    weights_per_code: ClassVar[int] = 1
    """Weights held in one element of the tensor ``weight``."""

    @abstractmethod
    def pack(
        self,
        weight: Tensor,
        weight_amax: Tensor,
        *,
        input_amax: Tensor | None = None,
        pre_quant_scale: Tensor | None = None,
        block_size: int | None = None,
    ) -> dict[str, Tensor]:
        """Quantizes a weight to what is written to disk.

        Args:
            weight: ``[out, in]``, any float type.
            weight_amax: Largest magnitude that each scale covers, in any shape with as many
                elements as there are scales.
            input_amax: Scalar, the largest magnitude of the activations.
            pre_quant_scale: ``[in]``, the factor on the input channels, its inverse already
                inside ``weight``.
            block_size: Input channels that share a scale, in formats with blocks.

        Returns:
            Tensors by suffix. Scales are float32.

        Raises:
            CalibrationError: A scale is missing, infinite, NaN or negative.
            CheckpointError: The weight does not fit the layout.
        """

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, shape: Sequence[int]
    ) -> Tensor:
        """Decodes a weight read from disk.

        The factor ``pre_quant_scale`` belongs to the input and is not applied.

        Args:
            tensors: A layer's tensors by suffix.
            dtype: Type that the model computes in; the result is rounded to it.
            shape: ``[out, in]`` of the layer.

        Returns:
            ``[out, in]``, float32.

        Raises:
            CheckpointError: A tensor is missing, or has another type or shape than the
                layout says, or a scale is not a positive number.
        """

    def quantize_activation(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        """Rounds activations as a kernel of this format does.

        Args:
            x: Input of the layer, after ``pre_quant_scale``.
            input_scale: Scalar from disk.

        Returns:
            ``x`` rounded to the codes times ``input_scale``, in its own type; formats that
            leave the activations alone return ``x``.
        """
        return x

    @abstractmethod
    def settings(self, block_size: int | None) -> dict[str, Any]:
        """Returns a layer's entry in ``hf_quant_config.json``."""

    @abstractmethod
    def scheme(self, block_size: int | None) -> dict[str, Any]:
        """Returns a layer's ``config_groups`` entry in ``config.json``, without its targets."""

    def bits_per_weight(self, tensors: Mapping[str, Tensor]) -> float:
        """Returns the stored bits of all ``tensors``, scales included, over the weights."""
        stored = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
        return stored / (tensors["weight"].numel() * self.weights_per_code)


def scales(
    amax: Tensor | None, bound: float, *, count: int, what: str, reciprocal: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns what numbers are multiplied by to become codes, and what codes are to come back.

    Args:
        amax: Largest magnitudes, ``count`` of them in any shape.
        bound: Largest code.
        count: Scales that the layout has room for.
        what: Name of the quantity, for the error.
        reciprocal: Multiply ``bound`` by ``1 / amax`` instead of dividing it, one rounding more.
            ModelOpt does so for FP8 and not for integers, and where many weights lie halfway
            between two codes (bfloat16 ones do) the last bit decides.

    Returns:
        Both ``[count]``, float32. Where ``amax`` vanishes, the codes are zero and the scale is
        that of ``SMALLEST_AMAX``.
    """
    if amax is None or amax.numel() != count:
        raise CalibrationError(
            f"{what} does not fit the format",
            found="no scale" if amax is None else f"{amax.numel()} scales",
            allowed=f"{count} scales",
        )
    amax = amax.detach().reshape(-1).float()
    if not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
        raise CalibrationError(f"{what} has values that are not finite, or negative")
    vanishing = amax <= VANISHING_AMAX
    safe = torch.where(vanishing, SMALLEST_AMAX, amax)
    factor = safe.reciprocal() * bound if reciprocal else torch.full_like(safe, bound) / safe
    return torch.where(vanishing, 0.0, factor), factor.reciprocal()


def take(
    tensors: Mapping[str, Tensor], suffix: str, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """Returns a tensor read from disk after comparing it with the layout.

    Raises:
        CheckpointError: It is missing, of another type or shape, or a scale that is not a
            positive number.
    """
    tensor = tensors.get(suffix)
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            "a quantized tensor is not as its layout says",
            where=suffix,
            found="nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
            allowed=f"{dtype} {tuple(shape)}",
        )
    if suffix.endswith("scale") and not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
        raise CheckpointError("a scale is not a positive number everywhere", where=suffix)
    return tensor
