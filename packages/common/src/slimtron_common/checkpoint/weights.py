"""Walk the parameters of a model together with the Hugging Face tensors they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.mapping import Parameter, model_parameters
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.unwrap import unwrap_chunks

__all__ = [
    "BoundParameter",
    "bound_parameters",
    "gather_shards",
    "load_weights",
    "stage_tensors",
    "whole_tensors",
]


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
    """Lists every parameter of this process in the order of the whole model.

    Of a mixture of experts these are the experts that expert parallelism gave to the process, of
    an interleaved pipeline's stage those of one virtual chunk after the other.

    Raises:
        UnsupportedModelError: The model has parameters that the architecture does not explain,
            or lacks one that it promises.
    """
    return [
        bound for chunk in unwrap_chunks(model) for bound in _bound_parameters(chunk, architecture)
    ]


def _bound_parameters(model: nn.Module, architecture: Architecture) -> list[BoundParameter]:
    present = dict(model.named_parameters())
    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    # What lies outside layers, or is no expert's, has no number.
    local = {None: None, **{layer.layer_number - 1: i for i, layer in enumerate(layers)}}
    mlp = getattr(layers[0], "mlp", None)
    indices = getattr(mlp, "local_expert_indices", [])
    experts = {None: None, **{expert: i for i, expert in enumerate(indices)}}
    bound = []
    for layer, rule in model_parameters(architecture):
        if layer not in local or rule.expert not in experts:
            continue
        names = [n.format(layer=local[layer], expert=experts[rule.expert]) for n in rule.names]
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

    Every process of the stage must walk the iterator, since each step gathers.
    """

    def convert(bound: BoundParameter) -> Iterable[tuple[str, torch.Tensor]]:
        shards = gather_shards(bound.tensor.detach(), context)
        return zip(bound.rule.hf_names, bound.rule.layout.split(shards), strict=True)

    parameters = [b for b in bound_parameters(model, architecture) if not b.is_copy]
    return stage_tensors(parameters, convert, context)


def stage_tensors(
    parameters: Iterable[BoundParameter],
    convert: Callable[[BoundParameter], Iterable[tuple[str, torch.Tensor]]],
    context: ParallelContext,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what is made of this stage's parameters, other processes' experts included.

    Every process of the stage must walk the iterator: processes that hold other experts convert
    them in turn and send what comes out, so that it comes in the order of the model.

    Args:
        parameters: Those of this process, as ``bound_parameters`` lists them.
        convert: Makes named tensors of one of them, alike on all processes that share its
            experts out. It may communicate over tensor parallelism.
        context: This process's place.
    """
    for is_expert, group in itertools.groupby(parameters, lambda b: b.rule.expert is not None):
        own = list(group)
        for owner in range(context.ep_size if is_expert else 1):
            for bound in own:
                if not is_expert:
                    yield from convert(bound)
                else:
                    tensors = list(convert(bound)) if owner == context.ep_rank else []
                    yield from _broadcast(tensors, owner, context)


def _broadcast(
    tensors: list[tuple[str, torch.Tensor]], owner: int, context: ParallelContext
) -> list[tuple[str, torch.Tensor]]:
    """Sends named tensors of any type from one process that holds experts to the others."""
    if context.ep_size == 1:
        return tensors
    source = dist.get_global_rank(context.ep_group, owner)
    heads: list[Any] = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors]]
    dist.broadcast_object_list(heads, src=source, group=context.ep_group)
    if owner != context.ep_rank:
        tensors = [
            (name, torch.empty(shape, dtype=dtype, device=context.device))
            for name, shape, dtype in heads[0]
        ]
    sent = []
    for name, tensor in tensors:
        # As bytes: not every backend knows the types of quantized weights.
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        dist.broadcast(raw, src=source, group=context.ep_group)
        sent.append((name, raw.view(tensor.dtype).reshape(tensor.shape)))
    return sent


def gather_shards(tensor: torch.Tensor, context: ParallelContext) -> list[torch.Tensor]:
    """Collects a tensor of one shape from every tensor-parallel process, by rank."""
    if context.tp_size == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(context.tp_size)]
    dist.all_gather(shards, tensor.contiguous(), group=context.tp_group)
    return shards
