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

__all__ = [
    "SMALLEST_AMAX",
    "VANISHING_AMAX",
    "Calibration",
    "Format",
    "checked_amax",
    "needed_scale",
    "refuse_input_factor",
    "scales",
    "take",
    "take_input_factor",
]

VANISHING_AMAX = 2.0**-24
"""ModelOpt quantizes everything whose amax is no larger than this to zero."""

_LIKELY_SCALES = (2.0**-40, 2.0**20)
"""Between the scale of ``SMALLEST_AMAX`` in the format with the most codes and that of activations
which no half type holds."""

SMALLEST_AMAX = 2.0**-23
"""The smallest amax worth having: a power of two, so exact in every float type, and far
enough above zero that no format's scale is subnormal in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the scales of one weight are made of."""

    weight_amax: Tensor
    """Largest magnitude of the weights that each scale covers, in any shape with as many elements
    as there are scales; ``[out, in / width]`` where a block covers several output channels."""

    tensor_amax: Tensor | None = None
    """Scalar, the layer's largest magnitude, in formats with a scale of scales."""

    input_amax: Tensor | None = None
    """Scalar, the largest magnitude of the activations, in formats that fix their scale."""

    input_factor: Tensor | None = None
    """``[in]``, the factor on the input channels, its inverse already inside the weight."""

    block_size: int | None = None
    """Input channels that share a scale, in formats that leave it open."""


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """How a linear layer's weight lies on disk, in ModelOpt's unified checkpoint layout.

    A layer's tensors are named by suffix: ``weight`` (the codes) and ``weight_scale``; then, by
    format, ``weight_scale_2`` (a scale of the scales or of their products), ``input_scale`` (of
    the activations, where it does not follow them) and ``pre_quant_scale`` (the factor that the
    input is multiplied by before it is quantized).

    Packing reproduces ModelOpt's fake quantization code by code. A weight that went through
    it already packs to the same codes, so packing ``quantizer(weight)`` with the scales of
    ``weight`` is exact for every algorithm and device.
    """

    name: str
    """Slimtron's name of the format."""

    quant_algo: ClassVar[str]
    """ModelOpt's name of the layout, by which inference engines choose their kernels."""

    block: ClassVar[tuple[int | None, int | None]] = (None, None)
    """Output and input channels that share a scale, where the format fixes them."""

    weights_per_code: ClassVar[int] = 1
    """Weights held in one element of the tensor ``weight``."""

    takes_amax_from_weight: ClassVar[bool] = False
    """Whether ModelOpt keeps no amax for the blocks and takes it from the weight each time."""

    has_two_levels: ClassVar[bool] = False
    """Whether ``Calibration.tensor_amax`` is needed."""

    always_stores_input_factor: ClassVar[bool] = False
    """Whether row-parallel layers need ``pre_quant_scale``, of ones if need be."""

    scale_bits: ClassVar[int] = 32
    """Width of one element of ``weight_scale``."""

    scalars: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the float32 scalars beside ``weight`` and ``weight_scale``."""

    def block_shape(self, block_size: int | None = None) -> tuple[int | None, int | None]:
        """Returns how many output and input channels share a scale; None is all of them.

        Args:
            block_size: Input channels in a block, in formats that leave it open.
        """
        return self.block

    def misfit(self, shape: Sequence[int], block_size: int | None = None) -> str | None:
        """Says why a weight ``[out, in]`` does not fit the layout; None where it does."""
        units = self.block_shape(block_size)
        for channels, size, unit in zip(("output", "input"), shape, units, strict=True):
            if unit is not None and (unit < 1 or size % unit):
                return f"blocks of {unit} on {size} {channels} channels"
        return None

    def check_shape(self, shape: Sequence[int], block_size: int | None = None) -> None:
        """Refuses a weight ``[out, in]`` that does not fit the layout.

        Raises:
            CheckpointError: A block does not divide a dimension.
        """
        if found := self.misfit(shape, block_size):
            raise CheckpointError(f"the weight does not fit the format {self.name}", found=found)

    @abstractmethod
    def pack(self, weight: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        """Quantizes a weight to what is written to disk.

        Args:
            weight: ``[out, in]``, any float type.
            calibration: What its scales are made of.

        Returns:
            Tensors by suffix.

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
            x: ``[..., in]``, input of the layer, after ``pre_quant_scale``.
            input_scale: Scalar from disk; None in formats that scale every input by itself.

        Returns:
            ``x`` rounded to the codes times their scales, in its own type; formats that
            leave the activations alone return ``x``.

        Raises:
            CheckpointError: The format needs a scale and there is none.
        """
        return x

    def settings(
        self, block_size: int | None = None, *, has_input_factors: bool = False
    ) -> dict[str, Any]:
        """Returns a layer's entry in ``hf_quant_config.json``.

        Args:
            block_size: Input channels in a block, in formats that leave it open.
            has_input_factors: Whether some layer of the model stores ``pre_quant_scale``.
        """
        return {"quant_algo": self.quant_algo}

    @abstractmethod
    def scheme(self, block_size: int | None = None) -> dict[str, Any]:
        """Returns a layer's ``config_groups`` entry in ``config.json``, without its targets."""

    def stored_bits(self, shape: Sequence[int], block_size: int | None = None) -> dict[str, int]:
        """Returns what a weight ``[out, in]`` takes on disk, in bits by suffix.

        ``pre_quant_scale`` comes on top where there is one.

        Args:
            shape: Of the whole weight, which fits the layout.
            block_size: Input channels in a block, in formats that leave it open.
        """
        num_weights = num_scales = 1
        for size, unit in zip(shape, self.block_shape(block_size), strict=True):
            num_weights *= size
            num_scales *= size // unit if unit else 1
        return {
            "weight": 8 * num_weights // self.weights_per_code,
            "weight_scale": self.scale_bits * num_scales,
            **dict.fromkeys(self.scalars, 32),
        }

    def bits_per_weight(self, tensors: Mapping[str, Tensor]) -> float:
        """Returns the stored bits of all ``tensors``, scales included, over the weights."""
        stored = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
        return stored / (tensors["weight"].numel() * self.weights_per_code)


def checked_amax(amax: Tensor | None, *, count: int, what: str) -> Tensor:
    """Returns an amax as float32 ``[count]``.

    Args:
        amax: Largest magnitudes in any shape.
        count: Scales that the layout has room for.
        what: Name of the quantity, for the error.

    Raises:
        CalibrationError: It is missing, of another count, not finite or negative.
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
    return amax


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

    Raises:
        CalibrationError: ``amax`` is missing, of another count, not finite or negative.
    """
    amax = checked_amax(amax, count=count, what=what)
    vanishing = amax <= VANISHING_AMAX
    safe = torch.where(vanishing, SMALLEST_AMAX, amax)
    factor = safe.reciprocal() * bound if reciprocal else torch.full_like(safe, bound) / safe
    return torch.where(vanishing, 0.0, factor), factor.reciprocal()


def refuse_input_factor(calibration: Calibration, name: str) -> None:
    """Refuses a factor on the input in a layout that has no place for one.

    Raises:
        CheckpointError: There is one.
    """
    if calibration.input_factor is not None:
        raise CheckpointError(
            f"the layout of {name} has no place for a factor on the input",
            where="pre_quant_scale",
            hint="fold it into the layer before",
        )


def needed_scale(input_scale: Tensor | None, name: str) -> Tensor:
    """Returns the scale of activations that has to be there.

    Raises:
        CheckpointError: It is not.
    """
    if input_scale is None:
        raise CheckpointError(f"{name} activations need a scale", where="input_scale")
    return input_scale


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
    if "scale" in suffix:
        if not bool(_is_positive(tensor).all()):
            raise CheckpointError("a scale is not a positive number everywhere", where=suffix)
        smallest, largest = (float(x) for x in tensor.float().aminmax())
        low, high = _LIKELY_SCALES
        # E8M0 is a power of two by itself.
        if tensor.dtype != torch.uint8 and not low <= smallest <= largest <= high:
            raise CheckpointError(
                "a scale is out of all proportion",
                where=suffix,
                found=f"{smallest:.3g} to {largest:.3g}",
                allowed=f"{low:.3g} to {high:.3g}",
            )
    return tensor


def take_input_factor(tensors: Mapping[str, Tensor], in_dim: int) -> None:
    """Checks the factor on the input where there is one.

    Raises:
        CheckpointError: It has another shape, or is not a positive number everywhere.
    """
    if (factor := tensors.get("pre_quant_scale")) is not None:
        take(tensors, "pre_quant_scale", factor.dtype, (in_dim,))


def _is_positive(scale: Tensor) -> Tensor:
    if scale.dtype == torch.uint8:
        # E8M0: a power of two, or NaN.
        return scale != 0xFF
    number = scale.float()
    return (number > 0) & torch.isfinite(number)
