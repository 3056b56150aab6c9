"""Walk the parameters of a model together with the Hugging Face tensors they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.mapping import Parameter, model_parameters
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.unwrap import unwrap_model

__all__ = ["BoundParameter", "bound_parameters", "gather_shards", "load_weights", "whole_tensors"]


@dataclass(frozen=True, slots=True)
class BoundParameter:
    """A parameter of this pipeline stage and the rule that it follows."""

    name: str
    """Its name in the model: ``decoder.layers.0.mlp.linear_fc1.weight``."""

    tensor: nn.Parameter
    rule: Parameter
    is_copy: bool = False
    """Whether it repeats the embedding (the tied output layer of a last pipeline stage)."""


def bound_parameters(model: nn.Module, architecture: Architecture) -> list[BoundParameter]:
    """Lists every parameter of this stage in the order of the whole model.

    Raises:
        UnsupportedModelError: The model has parameters that the architecture does not explain,
            or lacks one that it promises.
    """
    model = unwrap_model(model)
    present = dict(model.named_parameters())
    local = {layer.layer_number - 1: i for i, layer in enumerate(model.decoder.layers)}  # type: ignore[union-attr, arg-type]
    bound = []
    for layer, rule in model_parameters(architecture):
        if layer is not None and layer not in local:
            continue
        names = [n.format(layer=None if layer is None else local[layer]) for n in rule.names]
        name = next((n for n in names if n in present), None)
        if name is not None:
            bound.append(BoundParameter(name, present.pop(name), rule))
        elif layer is not None:
            raise UnsupportedModelError(
                "the model lacks a parameter of its architecture", found=", ".join(names)
            )
    if architecture.tied_embeddings and "output_layer.weight" in present:
        embedding = next(rule for _, rule in model_parameters(architecture))
        tensor = present.pop("output_layer.weight")
        bound.append(BoundParameter("output_layer.weight", tensor, embedding, is_copy=True))
    if present:
        raise UnsupportedModelError(
            "the model has parameters that no rule covers",
            found=", ".join(sorted(present)[:5]),
            hint=f"is it really a {architecture.family} model?",
        )
    return bound


@torch.no_grad()
def load_weights(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    read: Callable[[str], torch.Tensor],
) -> None:
    """Fills this process's part of ``model`` from whole Hugging Face tensors.

    Args:
        model: The model, at any tensor and pipeline size.
        architecture: What it is.
        context: This process's place.
        read: Returns one Hugging Face tensor by name.
    """
    for bound in bound_parameters(model, architecture):
        tensors = [read(name) for name in bound.rule.hf_names]
        bound.tensor.copy_(bound.rule.layout.merge(tensors, context.tp_rank, context.tp_size))


def whole_tensors(
    model: nn.Module, architecture: Architecture, context: ParallelContext
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields this stage's weights as whole Hugging Face tensors, in the order of the model.

    Every tensor-parallel process must walk the iterator, since each step gathers.
    """
    for bound in bound_parameters(model, architecture):
        if not bound.is_copy:
            shards = gather_shards(bound.tensor.detach(), context)
            yield from zip(bound.rule.hf_names, bound.rule.layout.split(shards), strict=True)


def gather_shards(tensor: torch.Tensor, context: ParallelContext) -> list[torch.Tensor]:
    """Collects a tensor of one shape from every tensor-parallel process, by rank."""
    if context.tp_size == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(context.tp_size)]
    dist.all_gather(shards, tensor.contiguous(), group=context.tp_group)
    return shards
