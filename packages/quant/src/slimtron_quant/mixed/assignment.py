"""From a budget and sensitivities to a recipe for every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from slimtron_common.errors import ConfigError
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.mixed.budget import choose_formats
from slimtron_quant.mixed.config import UNQUANTIZED, MixedPrecisionConfig
from slimtron_quant.mixed.sensitivity import Sensitivity
from slimtron_quant.mixed.storage import Storage
from slimtron_quant.recipes.overrides import check_override
from slimtron_quant.recipes.sources import Source, load_source

__all__ = ["assign", "candidate_sources", "quantization_of"]


def candidate_sources(config: MixedPrecisionConfig) -> dict[str, Source]:
    """Opens the recipes among the candidates, the one that searches first if there is one.

    Raises:
        ConfigError: There is no such recipe, or two of them cannot stand in one model.
        MissingDependencyError: ModelOpt is absent, or too old for one.
    """
    where = "candidates"
    sources = {
        name: load_source(name, where=where) for name in config.candidates if name != UNQUANTIZED
    }
    searching = [name for name, source in sources.items() if source.recipe.rewrites_weights]
    if len(searching) > 1:
        raise ConfigError(
            "only one candidate can be a recipe that searches",
            where=where,
            found=", ".join(searching),
            allowed="one of them, and recipes that only round",
        )
    base = next(iter(searching or sources))
    for name, source in sources.items():
        if name != base:
            check_override(sources[base], source, where=where)
    return {base: sources.pop(base), **sources}


def assign(
    storage: Storage, sensitivity: Sensitivity, config: MixedPrecisionConfig
) -> dict[str, str]:
    """Chooses a candidate for every group: the least harm in sum that the budget allows.

    Returns:
        Group's name -> candidate.
    """
    return choose_formats(
        {
            group: {
                name: (storage.cost(group, name, config), sensitivity.harm(group, name))
                for name in options
            }
            for group, options in storage.options.items()
        },
        storage.available(config),
    )


def quantization_of(
    chosen: Mapping[str, str], sources: Mapping[str, Source], config: QuantizationConfig
) -> QuantizationConfig:
    """Returns the quantization that gives every group its candidate.

    Args:
        chosen: Group's name -> candidate.
        sources: The recipes, the one that searches first if there is one.
        config: The job's, for everything but recipe and overrides; its block size is settled.
    """
    counts = Counter(name for name in chosen.values() if name != UNQUANTIZED)
    first = next(iter(sources))
    # A recipe that searches cannot be an override.
    is_needed = sources[first].recipe.rewrites_weights and first in counts
    base = first if is_needed or not counts else counts.most_common(1)[0][0]
    return replace(
        config,
        algorithm=base,
        overrides={
            group: None if name == UNQUANTIZED else name
            for group, name in chosen.items()
            if name != base
        },
    )
