"""Find the Megatron-Core model inside whatever holds it."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimtron_common.errors import UnsupportedModelError

__all__ = ["is_megatron_model", "unwrap_chunks", "unwrap_model"]

_MODEL_CLASSES = frozenset({"GPTModel", "HybridModel", "MambaModel"})


def is_megatron_model(module: object) -> bool:
    """Tells whether ``module`` is a bare Megatron-Core language model.

    Recognised by class name and package, so neither NeMo nor a particular Megatron-Core needs
    to be installed. NeMo's Lightning wrapper is also called ``GPTModel`` but lives elsewhere.
    """
    return any(
        cls.__name__ in _MODEL_CLASSES and cls.__module__.startswith("megatron.core.")
        for cls in type(module).__mro__
    )


def unwrap_model(model: Any) -> nn.Module:
    """Returns the one bare Megatron-Core model inside ``model``.

    Opens NeMo's ``MegatronParallel`` and Lightning modules, Megatron's distributed data
    parallel and ``Float16Module`` wrappers, and a list with one chunk.

    Raises:
        UnsupportedModelError: Nothing of the kind is inside, or there are several virtual
            pipeline chunks (``unwrap_chunks`` returns those).
    """
    chunks = unwrap_chunks(model)
    if len(chunks) > 1:
        raise UnsupportedModelError(
            "the model is cut into several virtual pipeline chunks",
            found=f"{len(chunks)} chunks",
            allowed="one chunk a process",
            hint="build the model without virtual pipeline parallelism",
        )
    return chunks[0]


def unwrap_chunks(model: Any) -> list[nn.Module]:
    """Returns every bare Megatron-Core model inside ``model``, in virtual-pipeline order.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = _search(model)
    if not found:
        raise UnsupportedModelError(
            "no Megatron-Core language model is inside the object that was given",
            found=f"{type(model).__module__}.{type(model).__qualname__}",
            allowed="GPTModel, MambaModel or HybridModel of megatron.core, or a wrapper of one",
        )
    return found


def _search(holder: Any) -> list[nn.Module]:
    if is_megatron_model(holder):
        return [holder]
    # MegatronParallel is a ModuleList and forwards unknown attributes to its first chunk, so
    # its items come before its `.module`.
    if isinstance(holder, list | tuple | nn.ModuleList):
        return [chunk for item in holder for chunk in _search(item)]
    inner = getattr(holder, "module", None)
    return _search(inner) if inner is not None and inner is not holder else []
