"""What only the ``config.json`` of a hybrid has, of Mamba, attention and feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimtron_common.errors import CheckpointError, UnsupportedModelError
from slimtron_common.models.architecture import Architecture, Hybrid
from slimtron_common.models.fields import integer

__all__ = ["HYBRID_FIELDS", "hybrid_fields", "read_hybrid", "refuse_hybrid"]

HYBRID_FIELDS = frozenset(
    {
        "hybrid_override_pattern", "layers_block_type", "mamba_num_heads", "mamba_head_dim",
        "n_groups", "ssm_state_size", "conv_kernel",
    }
)  # fmt: skip
"""Fields that a ``Hybrid`` is read from."""

_KINDS = {
    "M": "M", "mamba": "M", "linear_attention": "M",
    "*": "*", "attention": "*", "full_attention": "*",
    "-": "-", "mlp": "-",
}  # fmt: skip
"""A layer's names in configs of all ages, and its letter."""

_FIXED: dict[str, Any] = {
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    # Megatron-Core's, of the convolution and of a Mamba layer's own norm.
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "sliding_window": None,
    "residual_in_fp32": False,
    "num_nextn_predict_layers": 0,
}
"""Fields that change what a model computes, and the one value known, which is also the default."""


def read_hybrid(config: Mapping[str, Any], source: str) -> Hybrid:
    """Reads what a model's layers are and how large its Mamba layers.

    Args:
        config: The parsed file.
        source: Its path, for messages.

    Raises:
        UnsupportedModelError: A layer is of another kind, or a feature has no counterpart here.
        CheckpointError: A field is missing, has the wrong type, or does not fit another.
    """
    for name, wanted in _FIXED.items():
        if config.get(name, wanted) not in (wanted, None):
            raise UnsupportedModelError(
                f"{name} is not supported in a hybrid",
                where=source,
                found=config[name],
                allowed=wanted,
            )
    _check_time_steps(config.get("time_step_limit"), source)
    layers = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if not isinstance(layers, list | str) or not layers:
        raise CheckpointError(
            "the hybrid does not say what its layers are",
            where=source,
            found=repr(layers),
            hint="hybrid_override_pattern has one letter a layer, such as M-M*-",
        )
    unknown = sorted({str(kind) for kind in layers if kind not in _KINDS})
    if unknown:
        raise UnsupportedModelError(
            "the hybrid has layers of a kind that is not supported",
            where=source,
            found=", ".join(unknown),
            allowed="Mamba (M), attention (*) and dense feed-forward networks (-)",
        )
    hybrid = Hybrid(
        pattern="".join(_KINDS[kind] for kind in layers),
        mamba_num_heads=integer(config, "mamba_num_heads", source),
        mamba_head_dim=integer(config, "mamba_head_dim", source),
        mamba_num_groups=integer(config, "n_groups", source),
        mamba_state_dim=integer(config, "ssm_state_size", source),
    )
    if "M" not in hybrid.pattern:
        raise UnsupportedModelError(
            "the hybrid has no Mamba layer",
            where=source,
            found=hybrid.pattern,
            allowed="one M or more",
        )
    if hybrid.mamba_num_heads % hybrid.mamba_num_groups:
        raise CheckpointError(
            "n_groups must divide mamba_num_heads",
            where=source,
            found=f"{hybrid.mamba_num_groups} and {hybrid.mamba_num_heads}",
        )
    return hybrid


def hybrid_fields(hybrid: Hybrid) -> dict[str, Any]:
    """Writes the fields that ``read_hybrid`` reads, by the names that all engines know."""
    return {
        "hybrid_override_pattern": hybrid.pattern,
        "mamba_num_heads": hybrid.mamba_num_heads,
        "mamba_head_dim": hybrid.mamba_head_dim,
        "n_groups": hybrid.mamba_num_groups,
        "ssm_state_size": hybrid.mamba_state_dim,
        "conv_kernel": hybrid.conv_kernel,
    }


def refuse_hybrid(architecture: Architecture, where: str) -> None:
    """Refuses hybrids where only transformers are known.

    Raises:
        UnsupportedModelError: The model is one.
    """
    if architecture.hybrid is not None:
        raise UnsupportedModelError(
            "hybrids with Mamba layers are pruned, evaluated and converted; for all else this "
            "version knows transformers alone",
            where=where,
            found=f"{architecture.family}, layers {architecture.hybrid.pattern}",
        )


def _check_time_steps(limit: Any, source: str) -> None:
    """Refuses time steps that are cut off, as Megatron-Core cuts off none."""
    if limit is None:
        return
    low, high = limit if isinstance(limit, list) and len(limit) == 2 else (None, None)
    # transformers 5 writes what JSON has no number for as an object.
    if isinstance(high, Mapping):
        high = math.inf if high.get("__float__") == "Infinity" else None
    if low != 0 or high != math.inf:
        raise UnsupportedModelError(
            "time_step_limit is not supported in a hybrid",
            where=source,
            found=limit,
            allowed="0 to infinity",
        )
