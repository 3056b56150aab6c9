"""Collect scores with hooks while Megatron's own schedule runs a text through a model.

Every process adds up its layers' channels of its sequences into zeros of the whole model's shape,
so that one sum over all processes makes the scores, in any layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimtron_common.errors import ParallelismError
from slimtron_common.models import Architecture
from slimtron_common.models.adjustments import weight_expert_outputs
from slimtron_common.parallel import ParallelContext, forward_only
from slimtron_common.progress import Progress
from slimtron_prune.scoring.scores import Scores, score_shapes

__all__ = ["check_layout", "collect_scores"]


def check_layout(
    architecture: Architecture,
    *,
    tensor_parallel_size: int,
    context_parallel_size: int,
) -> None:
    """Refuses layouts in which scores cannot be collected.

    Raises:
        ParallelismError: With what to do instead.
    """
    if context_parallel_size > 1:
        raise ParallelismError(
            "sequences are not cut over processes while they are scored",
            where="parallel.context_parallel_size",
            found=context_parallel_size,
            allowed=1,
            hint="score shorter sequences, or raise tensor and pipeline parallelism: a checkpoint "
            "opens in any layout",
        )
    if architecture.moe and tensor_parallel_size > 1:
        raise ParallelismError(
            "the norm of an expert's output cannot be told from its parts on several processes",
            where="parallel.tensor_parallel_size",
            found=tensor_parallel_size,
            allowed="1 for a mixture of experts",
            hint="raise pipeline or expert parallelism instead: a checkpoint opens in any layout",
        )


def collect_scores(
    model: Any,
    batches: Sequence[Tensor],
    architecture: Architecture,
    context: ParallelContext,
) -> Scores:
    """Runs a text through a model and scores its parts.

    All processes call it, in any layout that ``check_layout`` accepts; the model stays as it is.

    Args:
        model: A bare Megatron-Core model, in evaluation mode.
        batches: This data-parallel rank's token ids, each ``[b, s]``.
        architecture: What the model is.
        context: This process's place.

    Returns:
        The scores of the whole model on the whole text, the same on every process.
    """
    collector = _Collector(architecture, context)
    with collector.attached(model), Progress("score", len(batches)) as progress:
        forward_only(model, batches, context, lambda index, logits: progress.advance())
    if context.tp_rank == 0 and context.pp_rank == 0:
        collector.sums["num_tokens"] += sum(batch.numel() for batch in batches)
    sums = {}
    for name, value in collector.sums.items():
        dist.all_reduce(value)
        sums[name] = value.cpu()
    return Scores(architecture, sums)


class _Collector:
    def __init__(self, architecture: Architecture, context: ParallelContext) -> None:
        self.architecture = architecture
        self.context = context
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=context.device)
            for name, shape in score_shapes(architecture).items()
        }

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Hooks the scores into a model for the block."""
        handles: list[RemovableHandle] = []
        if self.architecture.moe:
            weight_expert_outputs(model)
        try:
            for layer in model.decoder.layers:
                handles.extend(self._attach(layer, layer.layer_number - 1))
            if self.context.is_last_stage:
                hook = self._whole(self.sums["final_residual"])
                decoder = model.decoder
                norm = decoder.final_norm if self.architecture.hybrid else decoder.final_layernorm
                handles.append(norm.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, layer: Any, number: int) -> Iterator[RemovableHandle]:
        yield layer.register_forward_hook(self._influence(number), with_kwargs=True)
        hybrid = self.architecture.hybrid
        kind = None if hybrid is None else hybrid.pattern[number]
        if kind in (None, "*"):
            yield from self._attention(layer, number)
        if kind in (None, "-"):
            yield from self._mlp(layer, number, norm=1 if kind is None else 0)
        if kind == "M":
            yield from self._mamba(layer, number)

    def _norm(self, norm: Any, after: Any, number: int, which: int) -> Iterator[RemovableHandle]:
        """Scores hidden channels before and after a norm, the one before the module ``after``."""
        # Transformer Engine fuses norms into what follows, and leaves identities in their place.
        residual, hidden = (self.sums[name][number, which] for name in ("residual", "hidden"))
        yield norm.register_forward_pre_hook(self._whole(residual))
        yield after.register_forward_pre_hook(self._whole(hidden, self._normalized))

    def _attention(self, layer: Any, number: int) -> Iterator[RemovableHandle]:
        attention, heads = layer.self_attention, self.sums["heads"][number]
        yield from self._norm(layer.input_layernorm, attention.linear_qkv, number, 0)
        measure = _head_energy(attention.linear_proj, self.architecture.head_dim)
        yield attention.linear_proj.register_forward_pre_hook(self._shard(heads, measure))

    def _mamba(self, layer: Any, number: int) -> Iterator[RemovableHandle]:
        assert self.architecture.hybrid is not None, "it has a Mamba layer"
        mixer, sums = layer.mixer, self.sums
        yield from self._norm(layer.norm, mixer.in_proj, number, 0)
        gated = self._shard(sums["mamba_gated"][number].view(-1), energy)
        yield mixer.norm.register_forward_pre_hook(gated)
        of_heads = _head_energy(mixer.out_proj, self.architecture.hybrid.mamba_head_dim)
        of_columns = mixer.out_proj.weight.double().square().sum(0)
        for target, measure in (
            (sums["mamba_heads"][number], of_heads),
            (sums["mamba_channels"][number].view(-1), lambda x: energy(x) * of_columns),
        ):
            yield mixer.out_proj.register_forward_pre_hook(self._shard(target, measure))

    def _mlp(self, layer: Any, number: int, *, norm: int) -> Iterator[RemovableHandle]:
        mlp, sums = layer.mlp, self.sums
        after = mlp if self.architecture.moe else mlp.linear_fc1
        yield from self._norm(layer.pre_mlp_layernorm, after, number, norm)
        if self.architecture.moe is None:
            hook = self._shard(sums["ffn"][number], energy)
            yield mlp.linear_fc2.register_forward_pre_hook(hook)
            return
        if mlp.shared_experts is not None:
            yield from self._shared(sums["shared"][number], mlp.shared_experts)
        experts = zip(mlp.local_expert_indices, mlp.experts.local_experts, strict=True)
        for index, expert in experts:
            hook = self._shard(sums["ffn"][number, index], energy)
            yield expert.linear_fc2.register_forward_pre_hook(hook)
            yield expert.register_forward_hook(self._expert(number, index))

    def _influence(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._counts_tokens:
                before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                after = output[0] if isinstance(output, tuple) else output
                similarity = F.cosine_similarity(before.float(), after.float(), dim=-1)
                self.sums["layers"][number] += (1 - similarity).sum(dtype=torch.float64)

        return hook

    @property
    def _counts_tokens(self) -> bool:
        """Whether this process's tokens are not counted by another one.

        Tensor-parallel processes hold the same tokens, unless the sequence is cut, too.
        """
        return self.context.tp_rank == 0 or self.context.sequence_parallel

    def _whole(
        self, target: Tensor, of: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> Callable[..., None]:
        """Adds the energy of the hidden channels of a module's input, or of what is made of it."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._counts_tokens:
                target.add_(energy(args[0] if of is None else of(module, args[0])))

        return hook

    def _shard(self, target: Tensor, measure: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        """Adds a measure of this process's part of what a module is given."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            measured = measure(args[0])
            start = self.context.tp_rank * len(measured)
            target[start : start + len(measured)] += measured

        return hook

    def _shared(self, target: Tensor, module: Any) -> Iterator[RemovableHandle]:
        """Adds the energy of a shared expert's channels, as much of it as its gate lets through."""
        gates: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            gates.append(F.linear(args[0], module.gate_weight).sigmoid())

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            target.add_(energy(args[0] * gates.pop()))

        yield module.register_forward_pre_hook(take)
        yield module.linear_fc2.register_forward_pre_hook(add)

    def _expert(self, number: int, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> None:
            self.sums["experts"][number, index] += energy(output[0]).sum()

        return hook

    def _normalized(self, module: nn.Module, hidden: Tensor) -> Tensor:
        return normalized(module, hidden, self.architecture)


def _head_energy(projection: Any, head_dim: int) -> Callable[[Tensor], Tensor]:
    """Makes a measure of what each head adds to the residual stream.

    The energy of ``W x`` is ``x' (W'W) x``, with a small matrix for each head.
    """
    weight = projection.weight.float()
    by_head = weight.reshape(weight.shape[0], -1, head_dim)
    products = torch.einsum("ohd,ohe->hde", by_head, by_head)

    def measure(x: Tensor) -> Tensor:
        x = x.float().reshape(-1, *products.shape[:2])
        return torch.einsum("thd,hde,the->h", x, products, x).double()

    return measure


def energy(activations: Tensor) -> Tensor:
    """Sums the squares of each channel over tokens.

    Args:
        activations: ``[..., c]``.

    Returns:
        ``[c]``, float64.
    """
    return (
        activations.float().square().reshape(-1, activations.shape[-1]).sum(0, dtype=torch.float64)
    )


def normalized(module: nn.Module, hidden: Tensor, architecture: Architecture) -> Tensor:
    """What a norm puts out, whether it comes before a linear layer or is fused into it.

    Args:
        module: The layer after the norm; Transformer Engine's hold the norm's weight.
        hidden: What the layer is given, ``[s, b, h]``.
        architecture: What the model is.
    """
    weight: Any = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return hidden
    shape, epsilon, x = hidden.shape[-1:], architecture.norm_epsilon, hidden.float()
    weight = weight.float() + (1 if architecture.normalization.endswith("1p") else 0)
    if architecture.normalization == "layernorm1p":
        bias: Any = module.layer_norm_bias
        return F.layer_norm(x, shape, weight, bias.float(), epsilon)
    return F.rms_norm(x, shape, weight, epsilon)
