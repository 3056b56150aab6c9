"""Experts of a mixture during calibration: their tokens counted, their input scales shared.

Inference engines multiply all experts of a layer in one kernel with one input scale, the largest
of the experts' (vLLM, SGLang and TensorRT-LLM take it when they load a checkpoint). Calibration
gives every expert that scale, as ModelOpt does among the experts of one process. An expert that
saw no token has one that way, too.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.errors import ConfigError
from slimtron_common.parallel.context import ParallelContext

__all__ = [
    "ExpertTokens",
    "RoutedTokens",
    "expert_modules",
    "share_maxima",
    "warn_of_short_experts",
]

logger = logging.getLogger(__name__)

_LINEARS = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTokens:
    """How many tokens of the calibration text the router of one layer sent to each expert."""

    layer: int
    """Counted from 0 over the whole model."""

    tokens: tuple[int, ...]
    """By expert, over all processes."""

    def below(self, threshold: int) -> tuple[int, ...]:
        """The experts that got fewer tokens than ``threshold``."""
        return tuple(expert for expert, count in enumerate(self.tokens) if count < threshold)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertTokens:
        """Reads ``to_dict``'s output."""
        return cls(layer=data["layer"], tokens=tuple(data["tokens"]))


class RoutedTokens:
    """Counts where routers send tokens; sends every token to every expert on request.

    Args:
        model: The bare Megatron-Core model.
        to_all: Whether experts see every token. The layers' outputs stay those of the routed
            experts, for the weight of an expert that was not chosen is 0.

    Raises:
        ConfigError: ``to_all`` with experts that see a fixed number of tokens.
    """

    def __init__(self, model: Any, *, to_all: bool = False) -> None:
        self._config = model.config
        self._to_all = to_all
        self._layers = [layer for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
        self._counts: list[Tensor] = []
        if to_all and self._layers:
            _check_dispatch(self._config)

    def during(self, forward_loop: Callable[[Any], None]) -> Callable[[Any], None]:
        """Wraps a forward loop. Of several runs of it the last one counts."""

        def loop(model: Any) -> None:
            self._counts = []
            with ExitStack() as hooks:
                for layer in self._layers:
                    router = layer.mlp.router
                    count = torch.zeros(
                        self._config.num_moe_experts, dtype=torch.int64, device=router.weight.device
                    )
                    self._counts.append(count)
                    handle = router.register_forward_hook(self._hook(count))
                    hooks.callback(handle.remove)
                    if self._to_all:
                        hooks.enter_context(_dispatching_to_all(layer.mlp.token_dispatcher))
                forward_loop(model)

        return loop

    def result(self, context: ParallelContext) -> list[ExpertTokens]:
        """Returns the counts of every layer of the whole model; the same on all processes."""
        found = []
        for layer, count in zip(self._layers, self._counts, strict=False):
            total = count.clone()
            dist.all_reduce(total, group=context.dp_cp_group)
            if self._config.sequence_parallel:
                # Each of these processes routes a part of the sequence; else all of it.
                dist.all_reduce(total, group=context.tp_group)
            found.append(ExpertTokens(layer=layer.layer_number - 1, tokens=tuple(total.tolist())))
        stages: list[list[ExpertTokens]] = [[]] * context.pp_size
        dist.all_gather_object(stages, found, group=context.pp_group)
        return [layer for stage in stages for layer in stage]

    def _hook(self, count: Tensor) -> Callable[..., tuple[Tensor, Tensor] | None]:
        def observe(
            _: nn.Module, __: Any, output: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor] | None:
            weights, chosen = output
            count.add_(chosen.sum(0))
            return (weights, torch.ones_like(chosen)) if self._to_all else None

        return observe


def warn_of_short_experts(experts: Sequence[ExpertTokens], threshold: int) -> None:
    """Logs how many experts got fewer tokens than ``threshold``."""
    if short := sum(len(layer.below(threshold)) for layer in experts):
        logger.warning(
            "%d of %d experts saw fewer than %d calibration tokens: calibrate on more text, or on "
            "every token (calibrate_all_experts)",
            short,
            sum(len(layer.tokens) for layer in experts),
            threshold,
        )


def expert_modules(model: nn.Module) -> list[Any]:
    """Lists the layers' experts that quantizers see one by one, in the order of the model."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    return [module for module in model.modules() if isinstance(module, SequentialMLP)]


@torch.no_grad()
def share_maxima(model: nn.Module, maxima: Iterable[tuple[Any, Tensor | None]]) -> Iterator[Any]:
    """Gives the experts of a layer the largest magnitude that any of them saw.

    A collective over the processes that hold a layer's experts: whichever of their quantizers
    calibrate, all processes call it.

    Args:
        model: The model, with ModelOpt's quantizers.
        maxima: Quantizers with the largest magnitudes that they saw, a scalar or one for each
            channel in the last dimension; None where they saw nothing.

    Yields:
        Pairs of a quantizer of an expert's input and what it has to take instead.
    """
    seen = {id(quantizer): (quantizer, largest) for quantizer, largest in maxima}
    for experts in expert_modules(model):
        for linear in _LINEARS:
            modules = [getattr(expert, linear) for expert in experts.local_experts]
            weight = modules[0].weight
            members = [
                seen[id(module.input_quantizer)]
                for module in modules
                if id(getattr(module, "input_quantizer", None)) in seen
            ]
            # The first is for quantizers with one scale, the others for those with one a channel.
            shared = torch.zeros(1 + weight.shape[1], device=weight.device)
            for quantizer, largest in members:
                if largest is not None:
                    part = _part(shared, quantizer)
                    # A NaN would be lost in the exchange; what is infinite is refused, too.
                    values = largest.float().nan_to_num(nan=math.inf, posinf=math.inf)
                    torch.maximum(part, values.reshape(part.shape), out=part)
            for group in (experts.dp_group, experts.ep_group):
                dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
            for quantizer, largest in members:
                taken = _part(shared, quantizer).to(weight.dtype)
                yield quantizer, taken if largest is None else taken.reshape(largest.shape)


def _part(shared: Tensor, quantizer: Any) -> Tensor:
    return shared[0] if quantizer._calibrator._axis is None else shared[1:].unsqueeze(0)


@contextmanager
def _dispatching_to_all(dispatcher: Any) -> Iterator[None]:
    """Lets a dispatcher take as many copies of a token as there are experts."""
    config = dispatcher.config
    dispatcher.config = copy.copy(config)
    # Of a dispatcher's settings this one counts the copies; the router has its own.
    dispatcher.config.moe_router_topk = config.num_moe_experts
    try:
        yield
    finally:
        dispatcher.config = config


def _check_dispatch(config: Any) -> None:
    for name, allowed in (
        ("moe_token_dispatcher_type", ("alltoall",)),
        ("moe_expert_capacity_factor", (None,)),
    ):
        found = getattr(config, name)
        if found not in allowed:
            raise ConfigError(
                "this model's experts cannot see every token",
                where="calibrate_all_experts",
                found=f"{name} {found}",
                allowed=" or ".join(map(str, allowed)),
            )
