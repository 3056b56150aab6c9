"""Mixed precision in a job: the candidates, and which of them every layer gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimtron_common.checkpoint import Checkpoint
from slimtron_common.config import fingerprint, to_dict
from slimtron_common.data import TokenDataset
from slimtron_common.errors import ConfigError
from slimtron_common.models import Architecture
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.job.config import QuantJobConfig
from slimtron_quant.mixed.assignment import assign, candidate_sources, quantization_of
from slimtron_quant.mixed.config import UNQUANTIZED, MixedPrecisionConfig
from slimtron_quant.mixed.sensitivity import CandidateSensitivity, Sensitivity
from slimtron_quant.mixed.storage import Storage, model_storage
from slimtron_quant.recipes import Scheme, quantization_scheme
from slimtron_quant.recipes.sources import Source

__all__ = ["Assignment", "Candidates", "MixedPlan", "open_candidates", "plan_mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What there is to choose from, each fit for the model and the machine."""

    config: MixedPrecisionConfig
    quantization: QuantizationConfig
    """The job's, block size settled; without recipe and overrides."""

    sources: Mapping[str, Source]
    schemes: Mapping[str, Scheme]
    """What each recipe would make of the model by itself."""

    storage: Storage

    @property
    def num_measurements(self) -> int:
        """Groups times the recipes that apply to them."""
        options = self.storage.options.values()
        return sum(len(names.keys() - {UNQUANTIZED}) for names in options)

    @property
    def num_passes(self) -> float:
        """Forward passes over the sensitivity's tokens, in the mean.

        Each begins at its group's layer, and one more at every layer finds what the next gets.
        """
        layers = len({group.layer for group in self.storage.groups})
        return (self.num_measurements + len(self.schemes) * layers) / 2 + 2 * len(self.schemes)

    def candidate(self, name: str) -> QuantizationConfig:
        """Returns the quantization of the whole model to one recipe.

        Without the KV cache's: what that does is the same for every choice.
        """
        return replace(self.quantization, algorithm=name, enable_kv_cache=None)

    def recipes(self) -> dict[str, str]:
        """Fingerprints of what the recipes are."""
        return {name: fingerprint(to_dict(item.config)) for name, item in self.schemes.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A candidate for every group."""

    chosen: Mapping[str, str]
    sensitivity: Sensitivity
    quantization: QuantizationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPlan:
    """A choice that can be made once the sensitivities are known."""

    candidates: Candidates
    text: TokenDataset
    """The sequences to measure on."""

    expected: Sensitivity
    """What a measurement says of model, text and recipes, without divergences."""

    saved: Sensitivity | None
    """What an earlier run measured."""

    def assign(self, sensitivity: Sensitivity) -> Assignment:
        """Chooses; the same on every process."""
        candidates = self.candidates
        chosen = assign(candidates.storage, sensitivity, candidates.config)
        return Assignment(
            chosen=chosen,
            sensitivity=sensitivity,
            quantization=quantization_of(chosen, candidates.sources, candidates.quantization),
        )

    def identity(self) -> dict[str, Any]:
        """What makes this choice this choice, for ``--resume``."""
        return {
            "recipes": self.candidates.recipes(),
            "text": dict(self.expected.text),
            "saved": self.saved and fingerprint(to_dict(self.saved)),
        }


def open_candidates(config: QuantJobConfig, architecture: Architecture, device: str) -> Candidates:
    """Checks every candidate and the budget against the model and the machine.

    Raises:
        ConfigError: A candidate does not fit, or no choice meets the budget.
        MissingDependencyError: ModelOpt is absent, or too old for one of the recipes.
    """
    try:
        sources = candidate_sources(config.mixed)
    except ConfigError as error:
        error.where = f"mixed.{error.where}"
        raise
    schemes = {}
    for name in sources:
        try:
            schemes[name] = quantization_scheme(
                replace(config.quantization, algorithm=name),
                architecture,
                tensor_parallel_size=config.parallel.tensor_parallel_size,
            )
            schemes[name].check_device(device)
        except ConfigError as error:
            named = (
                "mixed.candidates" if error.where == "algorithm" else f"quantization.{error.where}"
            )
            error.where = named
            raise
    quantization = config.quantization
    for name, scheme in schemes.items():
        if sources[name].recipe.has_blocks:
            # Alone on some of the layers, `auto` might find another.
            size = next(fmt.block_size for fmt in scheme.formats.values())
            quantization = replace(quantization, awq_block_size=size or quantization.awq_block_size)
    storage = model_storage(
        architecture,
        {name: schemes.get(name) for name in config.mixed.candidates},
        dtype=getattr(torch, config.export.torch_dtype),
    )
    storage.check(config.mixed)
    return Candidates(
        config=config.mixed,
        quantization=quantization,
        sources=sources,
        schemes=schemes,
        storage=storage,
    )


def plan_mixed(
    candidates: Candidates,
    checkpoint: Checkpoint,
    calibration: TokenDataset,
    *,
    data_parallel_size: int,
) -> MixedPlan:
    """Settles the text, and reads what an earlier run measured.

    Args:
        candidates: What there is to choose from.
        checkpoint: The model.
        calibration: The calibration's text; sensitivity is measured on the first of it.
        data_parallel_size: Processes that share out the sequences.

    Raises:
        CheckpointError: The saved sensitivities are of another model, text or recipe.
        ConfigError: There are too few sequences.
    """
    config, seq_length = candidates.config, calibration.seq_length
    text = TokenDataset(calibration.tokens[: max(1, config.sensitivity_tokens // seq_length)])
    expected = Sensitivity(
        model=checkpoint.identity,
        text={"fingerprint": calibration.fingerprint, "num_tokens": text.tokens.size},
        candidates={
            name: CandidateSensitivity(recipe=recipe, divergence={})
            for name, recipe in candidates.recipes().items()
        },
    )
    saved = None
    if config.sensitivity is not None:
        saved = Sensitivity.read(config.sensitivity)
        saved.check(expected, candidates.storage.options, where=config.sensitivity)
    elif text.num_sequences < data_parallel_size:
        raise ConfigError(
            "every data-parallel process needs a sequence",
            where="mixed.sensitivity_tokens",
            found=f"{text.num_sequences} sequences of {seq_length} tokens",
            allowed=f"{data_parallel_size} or more",
        )
    return MixedPlan(candidates=candidates, text=text, expected=expected, saved=saved)
