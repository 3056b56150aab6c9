"""The shapes that a model can be pruned to, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_common.models.counting import count_parameters
from slimtron_common.models.hybrid import refuse_hybrid
from slimtron_common.parallel.config import ParallelConfig
from slimtron_prune.search.config import SearchConfig
from slimtron_prune.targets import WIDTH_MULTIPLE

__all__ = ["Space", "count", "kv_cache_bytes", "search_space"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The shapes to search among."""

    source: Architecture
    choices: dict[str, tuple[Architecture, ...]]
    """Of each part that varies, by its name: the source with that part alone at every size that
    it may take, the largest first."""

    budget: int
    unit: str
    """What the budget counts: ``parameters`` or ``bytes``."""

    cache_tokens: int
    """Tokens whose keys and values count, too; 0 for a budget of parameters."""

    itemsize: int
    """Bytes of a stored number."""

    def __iter__(self) -> Iterator[Architecture]:
        """Yields every shape, fitting or not, but the source's own."""
        for parts in product(*self.choices.values()):
            shape = combine(self.source, dict(zip(self.choices, parts, strict=True)))
            if shape != self.source:
                yield shape

    def cost(self, shape: Architecture) -> int:
        """What a shape takes of the budget."""
        parameters = count(shape)
        if self.unit == "parameters":
            return parameters
        cache = kv_cache_bytes(shape, self.cache_tokens, self.itemsize)
        return parameters * self.itemsize + cache

    @property
    def num_probes(self) -> int:
        """Parts that vary, each of which is measured alone."""
        return len(self.choices)


_PARTS = {
    "layers": ("num_layers",),
    "hidden": ("hidden_size",),
    "ffn": ("ffn_hidden_size",),
    "heads": ("num_attention_heads", "num_query_groups"),
    "experts": ("moe",),
}
"""The fields of an architecture that vary together."""


def combine(source: Architecture, parts: dict[str, Architecture]) -> Architecture:
    """Returns the source with each part as in the architecture given for it."""
    changes = {
        field: getattr(architecture, field)
        for part, architecture in parts.items()
        for field in _PARTS[part]
    }
    return replace(source, **changes)


def search_space(
    source: Architecture, config: SearchConfig, parallel: ParallelConfig, itemsize: int
) -> Space:
    """Lists the shapes that hardware and layout can take.

    Args:
        source: The model.
        config: Budget and bounds.
        parallel: The layout that every shape has to be cut into.
        itemsize: Bytes of a stored number.

    Raises:
        ConfigError: No shape within the bounds fits, or the model itself does.
        UnsupportedModelError: The model is a hybrid.
    """
    refuse_hybrid(source, "search")
    options = {
        "layers": _layers(source, config),
        "hidden": _widths(source, config, "hidden_size"),
        "ffn": _widths(source, config, "ffn_hidden_size"),
        "heads": _heads(source, config),
        "experts": _experts(source, config),
    }
    choices = {}
    for part, shapes in options.items():
        fitting = [shape for shape in shapes if _can_be_cut(shape, parallel)]
        if not fitting:
            raise ConfigError(
                f"no number of {part} within the bounds can be laid out",
                where="search.bounds",
                found=f"tensor {parallel.tensor_parallel_size}, pipeline "
                f"{parallel.pipeline_parallel_size}, expert {parallel.expert_parallel_size}",
            )
        if fitting != [source]:
            choices[part] = tuple(fitting)
    memory = config.target_memory is not None
    space = Space(
        source=source,
        choices=choices,
        budget=_budget(source, config),
        unit="bytes" if memory else "parameters",
        cache_tokens=config.memory_batch_size * config.memory_seq_length if memory else 0,
        itemsize=itemsize,
    )
    largest, where = space.cost(source), f"search.{_budget_field(config)}"
    if largest <= space.budget:
        raise ConfigError(
            "the model itself fits into the budget",
            where=where,
            found=f"{space.budget:,} {space.unit}",
            allowed=f"below {largest:,}",
        )
    smallest = min((space.cost(shape) for shape in space), default=largest)
    if smallest > space.budget:
        raise ConfigError(
            "no shape within the bounds fits into the budget",
            where=where,
            found=f"{space.budget:,} {space.unit}",
            allowed=f"{smallest:,} or more",
            hint="lower the bounds, such as --bound num_layers=8:30",
        )
    return space


def count(architecture: Architecture) -> int:
    """Counts parameters, a tied output layer once."""
    a = replace(architecture, num_layers=1, hf_extras={})
    one, two = (_count(replace(a, num_layers=n)) for n in (1, 2))
    return one + (two - one) * (architecture.num_layers - 1)


def kv_cache_bytes(architecture: Architecture, num_tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    a = architecture
    return 2 * len(a.layers_with("attention")) * a.key_value_size * num_tokens * itemsize


def _count(architecture: Architecture) -> int:
    return sum(count_parameters(architecture).values())


def _budget_field(config: SearchConfig) -> str:
    names = ("target_params", "target_memory", "target_ratio")
    return next(name for name in names if getattr(config, name) is not None)


def _budget(source: Architecture, config: SearchConfig) -> int:
    if config.target_ratio is not None:
        return int(config.target_ratio * count(source))
    budget = config.target_params if config.target_memory is None else config.target_memory
    assert isinstance(budget, int), "the config has read it"
    return budget


def _bounds(config: SearchConfig, name: str, size: int) -> tuple[int, int]:
    low, high = config.bounds.get(name, (max(size // 2, 1), size))
    if low > size:
        raise ConfigError(
            "pruning makes a model smaller, not larger",
            where=f"search.bounds.{name}",
            found=low,
            allowed=f"at most {size}",
        )
    return low, min(high, size)


def _grid(low: int, high: int, size: int, minimum: int) -> list[int]:
    """Multiples of the largest power of two that makes eight steps or more, and both ends."""
    step = max(minimum, 1 << max((size // 8).bit_length() - 1, 0))
    inner = range(-(-low // step) * step, high + 1, step)
    ends = [n for n in (low, high) if n % minimum == 0 or n == size]
    return sorted({*inner, *ends}, reverse=True)


def _widths(source: Architecture, config: SearchConfig, name: str) -> list[Architecture]:
    size = getattr(source, name)
    low, high = _bounds(config, name, size)
    changes: list[dict[str, Any]] = [{name: n} for n in _grid(low, high, size, WIDTH_MULTIPLE)]
    return [replace(source, **change) for change in changes]


def _layers(source: Architecture, config: SearchConfig) -> list[Architecture]:
    low, high = _bounds(config, "num_layers", source.num_layers)
    return [replace(source, num_layers=n) for n in range(high, low - 1, -1)]


def _heads(source: Architecture, config: SearchConfig) -> list[Architecture]:
    low, high = _bounds(config, "num_attention_heads", source.num_attention_heads)
    fewest, most = _bounds(config, "num_query_groups", source.num_query_groups)
    per_group = source.num_attention_heads // source.num_query_groups
    pairs = [
        (groups * each, groups)
        for groups in range(fewest, most + 1)
        for each in range(1, per_group + 1)
        if low <= groups * each <= high
    ]
    return [
        replace(source, num_attention_heads=heads, num_query_groups=groups)
        for heads, groups in sorted(pairs, reverse=True)
    ]


def _experts(source: Architecture, config: SearchConfig) -> list[Architecture]:
    if source.moe is None:
        return [source]
    low, high = _bounds(config, "num_experts", source.moe.num_experts)
    low = max(low, source.moe.experts_per_token, 2)
    numbers = _grid(low, high, source.moe.num_experts, 1)
    return [replace(source, moe=replace(source.moe, num_experts=n)) for n in numbers]


def _can_be_cut(shape: Architecture, parallel: ParallelConfig) -> bool:
    return (
        parallel.tensor_parallel_size in shape.tensor_parallel_sizes
        and parallel.pipeline_parallel_size in shape.pipeline_parallel_sizes
        and parallel.expert_parallel_size in shape.expert_parallel_sizes
    )
