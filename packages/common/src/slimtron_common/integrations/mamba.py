"""Megatron-Core's Mamba mixer, made to run without mamba_ssm and on the CPU.

The mixer's scan and norm are mamba_ssm's Triton kernels, which need a GPU. On a GPU that has them
they are used; for all else there is the same in plain torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.errors import MissingDependencyError
from slimtron_common.integrations.mamba_scan import gated_rms_norm, split_conv_scan

__all__ = ["check_mamba", "import_mamba_mixer"]

logger = logging.getLogger(__name__)

_TENSOR_OPS = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"


def import_mamba_mixer() -> Any:
    """Imports the module of ``MambaMixer``, complete.

    Raises:
        MissingDependencyError: As ``check_mamba``.
    """
    check_mamba()
    with _without_triton():
        module: Any = importlib.import_module("megatron.core.ssm.mamba_mixer")
    if not hasattr(module.ExtendedRMSNorm, "falls_back"):
        kernels = module.HAVE_MAMBA_SSM
        scan = module.mamba_split_conv1d_scan_combined if kernels else None
        if not kernels and torch.cuda.is_available():
            logger.warning("mamba_ssm is not installed: Mamba layers run slowly, in plain torch")
        module.mamba_split_conv1d_scan_combined = _scan(scan)
        module.ExtendedRMSNorm = _norm_class(module.ExtendedRMSNorm if kernels else None)
        module.HAVE_MAMBA_SSM = True
    return module


def check_mamba() -> None:
    """Refuses what Megatron-Core's Mamba layers cannot do without.

    Raises:
        MissingDependencyError: einops is not installed.
    """
    if importlib.util.find_spec("einops") is None:
        raise MissingDependencyError(
            "Megatron-Core's Mamba layers compute with einops",
            found="not installed",
            hint="pip install einops",
        )


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """Stands in for kernels of Megatron-Core's inference, imported where Triton need not be."""
    if importlib.util.find_spec("triton") is not None or _TENSOR_OPS in sys.modules:
        yield
        return
    stand_in = ModuleType(_TENSOR_OPS)
    names = ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
    vars(stand_in).update(dict.fromkeys(names))
    sys.modules[_TENSOR_OPS] = stand_in
    try:
        yield
    finally:
        del sys.modules[_TENSOR_OPS]


def _scan(kernel: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    def scan(
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        dt_bias: Tensor,
        decay: Tensor,
        D: Tensor,  # noqa: N803 - the kernel's name
        chunk_size: int,
        **options: Any,
    ) -> Tensor:
        arguments = (projected, conv_weight, conv_bias, dt_bias, decay)
        if kernel is not None and projected.is_cuda:
            return kernel(*arguments, D=D, chunk_size=chunk_size, **options)
        assert options.get("seq_idx") is None, "one sequence a row"
        return split_conv_scan(
            *arguments,
            skip=D,
            num_groups=options["ngroups"],
            head_dim=options["headdim"],
            chunk_size=chunk_size,
        )

    return scan


def _norm_class(kernel: Any) -> type[nn.Module]:
    """Makes a norm of Megatron-Core's, or one that is saved as it is."""
    base: type[Any] = _GatedNorm if kernel is None else kernel

    class ExtendedRMSNorm(base):  # type: ignore[misc]
        falls_back = True

        def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
            if kernel is not None and x.is_cuda:
                normalized: Tensor = super().forward(x, z)
                return normalized
            assert z is None, "the scan has gated its output"
            return gated_rms_norm(x, self.weight, self.group_size, self.eps)

    return ExtendedRMSNorm


class _GatedNorm(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "the scan gates its output"
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Cuts the weight over the tensor-parallel processes, as Megatron-Core does."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return sharded
