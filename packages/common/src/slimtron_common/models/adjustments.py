"""What the models compute and Megatron-Core's modules do not, added by forward hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["scale_embeddings", "scales_embeddings", "weight_expert_outputs"]


def scale_embeddings(embedding: nn.Module) -> None:
    """Multiplies what an embedding puts out by the root of its width, as Gemma does."""
    embedding.register_forward_hook(_scale)


def scales_embeddings(embedding: nn.Module) -> bool:
    """Tells whether an embedding scales, by ``scale_embeddings`` or by NeMo's mixin."""
    names = {cls.__name__ for cls in type(embedding).__mro__}
    return _scale in embedding._forward_hooks.values() or "EmbeddingScalingMixin" in names


def weight_expert_outputs(model: nn.Module) -> None:
    """Lets the routing weights multiply what experts put out, once and for all.

    Megatron-Core multiplies the input of an expert's second layer. The sum is the same, but a
    quantizer would measure inputs there that no inference engine sees: engines, and the models
    as published, weight the output.

    Args:
        model: A model whose experts are ``SequentialMLP``; others are left as they are.
    """
    from megatron.core.transformer.moe.experts import SequentialMLP

    for module in model.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                if not any(isinstance(h, _Take) for h in expert._forward_pre_hooks.values()):
                    take = _Take()
                    expert.register_forward_pre_hook(take)
                    expert.register_forward_hook(_Multiply(take))


def _scale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    # Rounded to the type of the embeddings, as transformers does.
    return output * torch.tensor(output.shape[-1] ** 0.5, dtype=output.dtype)


class _Take:
    """Keeps the routing weights ``[tokens]`` from the expert's own forward."""

    weights: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, self.weights = args
        return (hidden,)


class _Multiply:
    def __init__(self, take: _Take) -> None:
        self._take = take

    def __call__(self, _: nn.Module, __: Any, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
        weights, self._take.weights = self._take.weights, None
        assert weights is not None
        hidden, bias = output
        return (hidden * weights.unsqueeze(-1)).to(hidden.dtype), bias
