"""The shape of a smaller model, and what no model can be pruned to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.architecture import Hybrid
from slimtron_prune.config import PruningConfig
from slimtron_prune.selection import kept_pattern

__all__ = ["WIDTH_MULTIPLE", "target_architecture"]

WIDTH_MULTIPLE = 8
"""Tensor cores multiply matrices whose sizes are multiples of this."""


def target_architecture(source: Architecture, config: PruningConfig) -> Architecture:
    """Returns the shape that a model is to be pruned to.

    Args:
        source: The model.
        config: The targets.

    Raises:
        ConfigError: A target is above the model's size, does not divide, or does not exist in
            this model, or there is nothing to prune.
    """
    if config.is_empty:
        raise ConfigError(
            "there is nothing to prune to",
            hint="set a target such as target_ffn_hidden_size, or drop_layers",
        )
    # Until it is known which layers stay, a hybrid's pattern is that of the first ones.
    if config.drop_layers is not None:
        return _without_layers(source, config.drop_layers)
    _refuse_absent(source, config)
    sizes = {
        "ffn_hidden_size": (config.target_ffn_hidden_size, "target_ffn_hidden_size"),
        "hidden_size": (config.target_hidden_size, "target_hidden_size"),
        "num_attention_heads": (config.target_num_attention_heads, "target_num_attention_heads"),
        "num_query_groups": (config.target_num_query_groups, "target_num_query_groups"),
        "num_layers": (config.target_num_layers, "target_num_layers"),
    }
    if source.moe:
        sizes["ffn_hidden_size"] = (
            config.target_moe_ffn_hidden_size,
            "target_moe_ffn_hidden_size",
        )
    changes: dict[str, Any] = {}
    for name, (wanted, where) in sizes.items():
        if wanted is not None:
            original = getattr(source, name)
            _check_size(where, wanted, original, width=name.endswith("hidden_size"))
            changes[name] = wanted
    moe = source.moe
    if moe and (experts := config.target_num_moe_experts) is not None:
        _check_size("target_num_moe_experts", experts, moe.num_experts, width=False)
        fewest = max(moe.experts_per_token, 2)
        if experts < fewest:
            raise ConfigError(
                f"each token goes to {moe.experts_per_token} of several experts",
                where="target_num_moe_experts",
                found=experts,
                allowed=f"{fewest} to {moe.num_experts}",
            )
        moe = replace(moe, num_experts=experts)
    width = config.target_moe_shared_expert_intermediate_size
    if moe and moe.shared_ffn_hidden_size is not None and width is not None:
        where = "target_moe_shared_expert_intermediate_size"
        _check_size(where, width, moe.shared_ffn_hidden_size, width=True)
        moe = replace(moe, shared_ffn_hidden_size=width)
    changes["moe"] = moe
    changes["hybrid"] = _target_hybrid(source, config)
    target = replace(source, **changes)
    _check_heads(source, target)
    if target == source:
        raise ConfigError(
            "every target is the model's own size: there is nothing to prune",
            found=", ".join(f"{name} {value}" for name, value in config.targets.items()),
        )
    return target


def _without_layers(source: Architecture, dropped: list[int]) -> Architecture:
    if max(dropped) > source.num_layers:
        raise ConfigError(
            "the model has no such layer",
            where="drop_layers",
            found=max(dropped),
            allowed=f"1 to {source.num_layers}",
        )
    if len(dropped) == source.num_layers:
        raise ConfigError("no layer would be left", where="drop_layers", found=dropped)
    left = [n for n in range(source.num_layers) if n + 1 not in dropped]
    hybrid = source.hybrid and replace(source.hybrid, pattern=kept_pattern(source.hybrid, left))
    return replace(source, num_layers=len(left), hybrid=hybrid)


def _target_hybrid(source: Architecture, config: PruningConfig) -> Hybrid | None:
    hybrid = source.hybrid
    if hybrid is None:
        return None
    heads, width = config.target_mamba_num_heads, config.target_mamba_head_dim
    if heads is not None:
        where = "target_mamba_num_heads"
        _check_size(where, heads, hybrid.mamba_num_heads, width=False)
        if heads % hybrid.mamba_num_groups:
            raise ConfigError(
                "every group of Mamba heads keeps equally many",
                where=where,
                found=heads,
                allowed=f"a multiple of {hybrid.mamba_num_groups}",
            )
        hybrid = replace(hybrid, mamba_num_heads=heads)
    if width is not None:
        _check_size("target_mamba_head_dim", width, hybrid.mamba_head_dim, width=True)
        hybrid = replace(hybrid, mamba_head_dim=width)
    return replace(hybrid, pattern=hybrid.pattern[: config.target_num_layers])


def _refuse_absent(source: Architecture, config: PruningConfig) -> None:
    absent = {}
    if not source.layers_with("mamba"):
        absent["target_mamba_num_heads"] = absent["target_mamba_head_dim"] = "Mamba layers"
    if not source.layers_with("attention"):
        absent["target_num_attention_heads"] = "attention"
    if source.moe is None or source.moe.shared_ffn_hidden_size is None:
        absent["target_moe_shared_expert_intermediate_size"] = "shared experts"
    hint: Any = None
    if source.moe or not source.layers_with("mlp"):
        absent["target_ffn_hidden_size"] = "dense feed-forward networks"
        hint = source.moe and "target_moe_ffn_hidden_size sets the width of the experts"
    if source.moe is None:
        absent["target_num_moe_experts"] = absent["target_moe_ffn_hidden_size"] = "experts"
    for name, parts in absent.items():
        if name in config.targets:
            raise ConfigError(
                f"the model has no {parts}",
                where=name,
                found=config.targets[name],
                allowed="nothing",
                hint=hint if "ffn" in name else None,
            )


def _check_size(where: str, wanted: int, original: int, *, width: bool) -> None:
    if wanted > original:
        raise ConfigError(
            "pruning makes a model smaller, not larger",
            where=where,
            found=wanted,
            allowed=f"at most {original}",
        )
    if width and wanted % WIDTH_MULTIPLE and wanted != original:
        raise ConfigError(
            "tensor cores would stand idle",
            where=where,
            found=wanted,
            allowed=f"a multiple of {WIDTH_MULTIPLE}, such as "
            f"{max(wanted // WIDTH_MULTIPLE, 1) * WIDTH_MULTIPLE}",
        )


def _check_heads(source: Architecture, target: Architecture) -> None:
    heads, groups = target.num_attention_heads, target.num_query_groups
    if heads % groups:
        raise ConfigError(
            "every key/value head serves as many query heads",
            where="target_num_attention_heads",
            found=f"{heads} with {groups} query groups",
            allowed=f"a multiple of {groups}",
        )
    per_group = source.num_attention_heads // source.num_query_groups
    if heads // groups > per_group:
        raise ConfigError(
            "a key/value head would serve more query heads than it was trained with",
            where="target_num_query_groups",
            found=f"{groups} for {heads} query heads",
            allowed=f"{-(-heads // per_group)} or more: at most {per_group} query heads each",
        )
