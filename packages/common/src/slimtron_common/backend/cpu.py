"""Megatron-Core on the CPU over gloo, for laptops, continuous integration and tests.

Megatron-Core asks for CUDA devices by name in its factories, its pipeline communication, its
random-number tracker and its optimizers. Inside ``cpu_backend()`` those requests are answered with
the CPU; on exit everything is as it was. Nothing happens on import.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from slimtron_common.integrations.megatron_core import import_moe_utils

__all__ = ["cpu_backend", "cpu_backend_active"]

_depth = 0


def cpu_backend_active() -> bool:
    """Tells whether the process is inside ``cpu_backend()``."""
    return _depth > 0


@contextlib.contextmanager
def cpu_backend() -> Iterator[None]:
    """Runs Megatron-Core on the CPU inside the ``with`` block; re-entrant.

    The redirections hold for the whole process except for the factory functions, which are
    redirected in the calling thread (a ``TorchFunctionMode`` is per thread).
    """
    global _depth
    if _depth:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
        return

    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(_CudaToCpu())
        _depth = 1
        try:
            yield
        finally:
            _depth = 0


def _replacements() -> list[tuple[Any, str, Any]]:
    # torch.compile decorates functions of Megatron-Core at import, and inspects torch.cuda then.
    importlib.import_module("megatron.core.models.gpt")
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    moe_utils = import_moe_utils()
    # Transformer Engine's product is for GPUs alone.
    router = [(moe_utils, "te_general_gemm", None)] if moe_utils.te_general_gemm else []
    cpu = torch.device("cpu")
    return [
        *router,
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "current_stream", lambda *_, **__: _Stream()),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", lambda *_, **__: contextlib.nullcontext()),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        (random.CheckpointFunction, "backward", _redirected(random.CheckpointFunction.backward)),
        (dist, "all_gather", _all_gather_of_any_size(dist.all_gather)),
        (dist, "reduce_scatter", _reduce_scatter_of_any_size(dist.reduce_scatter)),
        (dist, "all_to_all_single", _all_to_all_of_lists(dist.all_to_all_single)),
    ]


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    """Redirects inside a backward pass, where torch suspends the mode that called it.

    Activations that are computed again are: the model runs forward there.
    """

    def wrapped(*args: Any) -> Any:
        with _CudaToCpu():
            return function(*args)

    return wrapped


def _all_gather_of_any_size(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Gathers what gloo refuses: zero-dimensional tensors, and different numbers of rows."""

    def wrapped(
        outputs: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if tensor.dim() == 0:
            outputs = [output.view(1) if output.dim() == 0 else output for output in outputs]
            tensor = tensor.view(1)
        longest = max(map(len, outputs))
        if all(len(output) == longest for output in outputs):
            return all_gather(outputs, tensor, *args, **kwargs)
        padded = [output.new_empty(longest, *output.shape[1:]) for output in outputs]
        own = tensor.new_zeros(longest, *tensor.shape[1:])
        own[: len(tensor)] = tensor
        all_gather(padded, own, *args, **kwargs)
        for output, rows in zip(outputs, padded, strict=True):
            output.copy_(rows[: len(output)])
        return None

    return wrapped


def _reduce_scatter_of_any_size(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Sums for each process its part of the rows, which gloo wants to be equally many."""

    def wrapped(
        output: torch.Tensor,
        inputs: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [len(rows) for rows in inputs]
        if len(set(sizes)) == 1:
            return reduce_scatter(output, inputs, op, group, async_op)
        whole = torch.cat(inputs)
        dist.all_reduce(whole, op, group)
        output.copy_(torch.split(whole, sizes)[dist.get_rank(group)])
        return None

    return wrapped


def _all_to_all_of_lists(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """Gives torch numbers of rows as lists: Megatron-Core converts them from CUDA tensors alone."""

    def wrapped(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_as_list(arg) for arg in args)
        return all_to_all(output, tensor, *args, **{k: _as_list(v) for k, v in kwargs.items()})

    return wrapped


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


class _Stream:
    """Stands for a CUDA stream where every operation is synchronous."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, *_: object) -> None:
        pass

    def record_event(self, *_: object) -> _Stream:
        # All that anyone does with an event here is to wait for it.
        return self

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _CudaToCpu(TorchFunctionMode):
    """Rewrites a CUDA device among the arguments of a torch function into the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron-Core's optimizers sort parameters by the names of CUDA's types.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    # A bare index names a CUDA device; True and False are flags of Tensor.to.
    return isinstance(device, int) and not isinstance(device, bool)
