r"""What each format would do to each layer, from one pass over the text.

The loss of a model whose layer outputs are off by :math:`\Delta y` grows, to second order and in
the mean over tokens, by :math:`\tfrac12 E[(g \cdot \Delta y)^2]` (the empirical Fisher information,
with the gradient :math:`g` of the loss at a token's output). Rounding errors of different weights
and channels are as good as independent, so that for a weight :math:`W` rounded to :math:`W + E` and
inputs :math:`x` rounded to :math:`x + e`

.. math:: \Delta L \approx \tfrac12 \sum_o \overline{g_o^2}
          \sum_i \left(E_{oi}^2\, \overline{x_i^2} + W_{oi}^2\, \overline{e_i^2}\right),

where the means of the inputs weigh each token by its :math:`\|g\|^2`: in language models the tokens
with the largest activations are those that matter least. Two vectors a layer and one a format are
all that has to be kept of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.checkpoint.weights import gather_shards
from slimtron_common.integrations.modelopt import QuantConfig, to_modelopt
from slimtron_common.parallel import ParallelContext
from slimtron_quant.summary import global_name, layer_offset, linear_modules

__all__ = ["LayerSensitivity", "measure_sensitivity"]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSensitivity:
    """What the formats would do to one linear layer."""

    name: str
    """Module name, layers counted from 0 over the whole model."""

    num_parameters: int
    """Weights of the whole layer, over all tensor-parallel processes."""

    harm: Mapping[str, float]
    """Format -> expected increase of the loss, in nats a token."""


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    context: ParallelContext,
    candidates: Mapping[str, QuantConfig],
    backpropagate: Callable[[Any], None],
) -> list[LayerSensitivity]:
    """Measures every linear layer of the whole model; the same list on every process.

    Args:
        model: The bare Megatron-Core model, unquantized, in eval mode.
        context: This process's place.
        candidates: Format -> what ModelOpt would do in it.
        backpropagate: Runs this data-parallel rank's text forward and backward, with the sum of
            the tokens' losses.
    """
    layers = [
        _Layer(name, module, candidates, context) for name, module in linear_modules(model).items()
    ]
    with ExitStack() as stack:
        stack.enter_context(_differentiable(model))
        for layer in layers:
            stack.enter_context(layer.observed())
        backpropagate(model)
    offset = layer_offset(model)
    found = [layer.result(global_name(layer.name, offset)) for layer in layers]
    stages: list[list[LayerSensitivity]] = [[] for _ in range(context.pp_size)]
    dist.all_gather_object(stages, found, group=context.pp_group)
    return [layer for stage in stages for layer in stage]


class _Layer:
    """One linear layer and the sums over its inputs and output gradients."""

    def __init__(
        self,
        name: str,
        module: Any,
        candidates: Mapping[str, QuantConfig],
        context: ParallelContext,
    ) -> None:
        self.name = name
        self.context = context
        self.module = module
        out_features, in_features = module.weight.shape
        self.is_row = getattr(module, "input_is_parallel", None) is not None
        self.quantized = {
            key: _quantized_linear(module.weight, config) for key, config in candidates.items()
        }

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=module.weight.device)

        self.inputs = zeros(in_features)
        self.gradients = zeros(out_features)
        self.input_errors = {
            key: zeros(in_features)
            for key, linear in self.quantized.items()
            if linear.input_quantizer.is_enabled
        }
        self.num_tokens, self.total_weight = zeros(1), zeros(1)

    @contextmanager
    def observed(self) -> Iterator[None]:
        hook = self.module.register_forward_hook(self._observe)
        try:
            yield
        finally:
            hook.remove()

    def _observe(self, _: nn.Module, arguments: tuple[Tensor, ...], outputs: Any) -> None:
        x = arguments[0].detach()
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        output.register_hook(lambda gradient: self._observe_gradient(x, gradient.detach()))

    @torch.no_grad()
    def _observe_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """Adds one batch: ``x`` ``[s, b, in]`` and ``gradient`` ``[s, b, out]``."""
        self.num_tokens += gradient.shape[:-1].numel()
        self.gradients += _sum_of_squares(gradient)
        weight = self._token_weights(gradient).unsqueeze(-1)
        self.total_weight += weight.sum(dtype=torch.float64)
        self.inputs += _sum_of_squares(x * weight.sqrt())
        for key, total in self.input_errors.items():
            quantizer = self.quantized[key].input_quantizer
            quantizer.reset_amax()
            # Scaled to this batch's largest input; the calibrated scale covers all of the text.
            quantizer.amax = x.abs().amax().float()
            total += _sum_of_squares((quantizer(x) - x) * weight.sqrt())

    def _token_weights(self, gradient: Tensor) -> Tensor:
        """``|g|^2`` of the tokens that this process has inputs of, ``[s, b]`` fp32."""
        norms: Tensor = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
        weights = norms.square()
        if self.context.tp_size == 1:
            return weights
        if not self.is_row:
            # Each process has the gradients of its output channels.
            dist.all_reduce(weights, group=self.context.tp_group)
        if self.context.sequence_parallel:
            if not self.is_row:
                return weights.chunk(self.context.tp_size)[self.context.tp_rank]
            return torch.cat(gather_shards(weights, self.context))
        return weights

    def result(self, name: str) -> LayerSensitivity:
        """Sums over the processes and weighs every format's errors."""
        context = self.context
        over_inputs = [self.inputs, *self.input_errors.values(), self.total_weight]
        over_outputs = [self.gradients, self.num_tokens]
        for total in over_inputs + over_outputs:
            dist.all_reduce(total, group=context.dp_group)
        if context.sequence_parallel:
            # Each process saw other tokens: at a column-parallel layer's input, or at the output
            # of a row-parallel one.
            for total in over_outputs if self.is_row else over_inputs:
                dist.all_reduce(total, group=context.tp_group)
        weight = self.module.weight.float()
        gradients = (self.gradients / self.num_tokens.clamp(min=1)).float()
        per_token = 1 / self.total_weight.clamp(min=_TINY)
        harm = torch.zeros(len(self.quantized), dtype=torch.float64, device=weight.device)
        for index, (key, linear) in enumerate(self.quantized.items()):
            wrong = linear.weight_quantizer(self.module.weight).float() - weight
            harm[index] = (gradients @ wrong.square_() * self.inputs * per_token).sum()
            if key in self.input_errors:
                errors = self.input_errors[key] * per_token
                harm[index] += (gradients @ weight.square() * errors).sum()
        dist.all_reduce(harm, group=context.tp_group)
        return LayerSensitivity(
            name=name,
            num_parameters=weight.numel() * context.tp_size,
            harm=dict(zip(self.quantized, (harm / 2).tolist(), strict=True)),
        )


def _sum_of_squares(x: Tensor) -> Tensor:
    """Over all tokens: ``[..., channels]`` to ``[channels]`` fp64."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(0, -2), dim=0, dtype=torch.float32)
    return norms.double().square()


def _quantized_linear(weight: Tensor, config: QuantConfig) -> Any:
    """A linear layer with the same weight that ModelOpt has quantized on its own."""
    import modelopt.torch.quantization as mtq

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    holder = nn.ModuleDict({"linear": linear})
    mtq.quantize(holder, to_modelopt(config.with_algorithm("max")), lambda model: None)
    return holder["linear"]


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Has gradients flow through a model of frozen parameters."""
    embedding = getattr(model, "embedding", None)
    if embedding is None:
        # Not the first pipeline stage: its input has a gradient already.
        yield
        return
    hook = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
