"""One pair of layers whose outputs are brought together."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.errors import ConfigError, UnsupportedModelError
from slimtron_common.parallel.collectives import gather_from_group
from slimtron_distill.hidden.attach import attach_loss
from slimtron_distill.hidden.losses import cosine_loss, mse_loss
from slimtron_distill.layers import parse_layer

__all__ = ["HiddenMatch", "find_module", "make_projection"]

_CRITERIA = {"cosine": cosine_loss, "mse": mse_loss}


def find_module(chunk: Any, name: str) -> nn.Module | None:
    """Finds a module by its name in the whole model.

    Args:
        chunk: A ``GPTModel``: the part of the model that lies on one pipeline stage.
        name: As ``parse_layer`` takes it.

    Returns:
        The module, or None where another stage holds it.

    Raises:
        ConfigError: The layer is here and has no such module inside.
    """
    layer, rest = parse_layer(name)
    if layer is None:
        owner, _, attribute = rest.rpartition(".")
        return getattr(chunk.get_submodule(owner), attribute, None)
    for candidate in chunk.decoder.layers:
        if candidate.layer_number == layer + 1:
            try:
                found: nn.Module = candidate.get_submodule(rest)
            except AttributeError as error:
                raise ConfigError(
                    "the layer has no such module", where="intermediate_layer_pairs", found=name
                ) from error
            return found
    return None


class HiddenMatch(nn.Module):
    """Compares what a module of the student and one of the teacher put out.

    The teacher's forward pass must come first. The loss then hangs on the student's hidden state
    and needs no loss function.

    Args:
        pair: Names of the two modules.
        student: The student's module.
        teacher: The teacher's.
        criterion: How two hidden states are compared.
        widths: Channels of the student's and the teacher's hidden state. Where they differ, a
            linear projection of the student's is trained along.
        dtype: Type of its weights.
        device: Where they lie.
        sequence_parallel: Whether the student's, and the teacher's, hidden states are cut along
            the sequence over the tensor-parallel processes.
        group: The tensor-parallel group.
        gradient_scale: As ``attach_loss`` takes it.
    """

    projection: nn.Linear | None

    def __init__(
        self,
        pair: tuple[str, str],
        student: nn.Module,
        teacher: nn.Module,
        *,
        criterion: Literal["cosine", "mse"],
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        sequence_parallel: tuple[bool, bool],
        group: dist.ProcessGroup,
        gradient_scale: Callable[[], Tensor | None],
    ) -> None:
        super().__init__()
        self.pair = pair
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        """Of the tokens of this process since ``reset``, unweighted, float64."""
        self._compare = _CRITERIA[criterion]
        self._widths = widths
        self._sequence_parallel = sequence_parallel
        self._group = group
        self._gradient_scale = gradient_scale
        self._mask: Tensor | None = None
        self._weight = 0.0
        self._teacher_hidden: Tensor | None = None
        self.projection = None
        if widths[0] != widths[1]:
            self.projection = make_projection(pair, widths, dtype, device)
            for parameter in self.projection.parameters():
                # Megatron then sums the gradients of the parts of the sequence.
                parameter.sequence_parallel = sequence_parallel[0]  # type: ignore[attr-defined]
        teacher.register_forward_hook(self._take)
        student.register_forward_hook(self._match)

    def begin(self, loss_mask: Tensor, weight: float) -> None:
        """Opens the forward pass of a micro-batch.

        Args:
            loss_mask: ``[b, s]``, the factor of each token; 0 leaves it out.
            weight: Factor of the sum over tokens in the total loss.
        """
        mask = loss_mask.t()
        if self._sequence_parallel[0]:
            mask = mask.chunk(self._group.size())[self._group.rank()]
        self._mask, self._weight = mask, weight

    def end(self) -> None:
        """Closes it."""
        self._mask = self._teacher_hidden = None

    def reset(self) -> None:
        """Starts a new sum."""
        self.loss_sum.zero_()

    def _take(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._mask is not None:
            self._teacher_hidden = self._hidden(output, "teacher")

    def _match(self, _: nn.Module, __: Any, output: Any) -> Any:
        if self._mask is None:
            return None
        assert self._teacher_hidden is not None
        hidden = self._hidden(output, "student")
        student = hidden if self.projection is None else self.projection(hidden)
        losses = self._compare(student, self._aligned(self._teacher_hidden))
        self._teacher_hidden = None
        # Not a product: what is left out may be infinite.
        loss = torch.where(self._mask != 0, losses * self._mask, 0.0).sum()
        self.loss_sum += loss.detach()
        hidden = attach_loss(hidden, loss * self._weight, self._gradient_scale)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _hidden(self, output: Any, model: Literal["student", "teacher"]) -> Tensor:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        position = ("student", "teacher").index(model)
        width = self._widths[position]
        if hidden.dim() != 3 or hidden.shape[-1] != width:
            raise UnsupportedModelError(
                f"the {model}'s module puts out no hidden state",
                where=f"intermediate_layer_pairs: {self.pair[position]}",
                found=f"a tensor of shape {tuple(hidden.shape)}",
                allowed=f"[s, b, {width}]",
            )
        return hidden

    def _aligned(self, teacher: Tensor) -> Tensor:
        """Brings the teacher's hidden state to the student's part of the sequence."""
        student_cut, teacher_cut = self._sequence_parallel
        if student_cut and not teacher_cut:
            return teacher.chunk(self._group.size())[self._group.rank()]
        if teacher_cut and not student_cut:
            return gather_from_group(teacher, self._group, dim=0)
        return teacher


def make_projection(
    pair: tuple[str, str], widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> nn.Linear:
    """A linear layer whose weights are the same on every process, whatever was drawn before."""
    projection = nn.Linear(*widths, bias=False, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(zlib.crc32(":".join(pair).encode()))
    weight = torch.randn(widths[1], widths[0], generator=generator) / widths[0] ** 0.5
    projection.weight = nn.Parameter(weight.to(dtype=dtype, device=device))
    return projection
