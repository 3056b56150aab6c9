"""The linear layers of the decoder: what quantizers and pruners work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimtron_common.models.architecture import Architecture
from slimtron_common.models.mapping import model_parameters

__all__ = ["LinearLayer", "linear_layers"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLayer:
    """One linear layer, numbered and measured in the whole model."""

    kind: str
    """Its name inside a layer, without the expert: ``mlp.linear_fc1`` of a dense model,
    ``mlp.experts.linear_fc1`` of a mixture of experts."""

    layer: int
    expert: int | None
    in_features: int
    out_features: int
    parallel: Literal["column", "row"]
    """Which dimension tensor parallelism cuts: the output channels or the input channels."""

    @property
    def name(self) -> str:
        """Name of the module, layers counted over all stages and experts over all processes."""
        return self.local_name()

    def local_name(self, *, first_layer: int = 0, first_expert: int = 0) -> str:
        """Name of the module in a process whose layers and experts begin at these numbers."""
        kind = self.kind
        if self.expert is not None:
            local = f"experts.local_experts.{self.expert - first_expert}."
            kind = kind.replace("experts.", local)
        return f"decoder.layers.{self.layer - first_layer}.{kind}"

    def local_in_features(self, tensor_parallel_size: int) -> int:
        """Input channels that one process holds."""
        return self.in_features // (tensor_parallel_size if self.parallel == "row" else 1)


def linear_layers(architecture: Architecture) -> list[LinearLayer]:
    """Lists the decoder's linear layers in the order of the model; routers are none of them."""
    found = []
    for layer, rule in model_parameters(architecture):
        if layer is None or rule.layout.dim is None or len(rule.hf_shapes[0]) < 2:
            continue
        name = rule.names[0].removeprefix("decoder.layers.{layer}.").removesuffix(".weight")
        found.append(
            LinearLayer(
                kind=name.replace("local_experts.{expert}.", ""),
                layer=layer,
                expert=rule.expert,
                in_features=rule.hf_shapes[0][1],
                out_features=sum(rows for rows, *_ in rule.hf_shapes),
                parallel="row" if rule.layout.dim == -1 else "column",
            )
        )
    return found
