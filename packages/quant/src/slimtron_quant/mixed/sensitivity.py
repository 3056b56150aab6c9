"""Sensitivities on disk: measured once, good for every budget.

``sensitivity.json`` holds these keys::

    version: 1
    model: {parameters, fingerprint}       # see Checkpoint.identity
    text: {fingerprint, num_tokens}        # of the calibration's tokens; tokens measured on
    candidates:
      fp8:
        recipe: ...                        # fingerprint of the recipe's ModelOpt config
        divergence: {decoder.layers.0.mlp.linear_fc1: 0.0012, ...}   # nats a token, by group
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtron_common.checkpoint.base import read_json
from slimtron_common.errors import CheckpointError

__all__ = ["SENSITIVITY_NAME", "CandidateSensitivity", "Sensitivity"]

SENSITIVITY_NAME = "sensitivity.json"

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSensitivity:
    """What one format does to each group."""

    recipe: str
    """Fingerprint of the ModelOpt config."""

    divergence: Mapping[str, float]
    """Nats a token by the group's name: see ``mixed.divergence``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What every format does to every group, and what it was measured on."""

    model: Mapping[str, Any]
    text: Mapping[str, Any]
    candidates: Mapping[str, CandidateSensitivity]

    def to_json(self) -> str:
        """The content of ``sensitivity.json``."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Sensitivity:
        """Reads ``sensitivity.json``.

        Raises:
            CheckpointError: It is missing, malformed, or of another version.
        """
        tree = read_json(path)
        try:
            if tree.pop("version") != _VERSION:
                raise ValueError(f"its version is not {_VERSION}")
            candidates = {
                name: CandidateSensitivity(
                    recipe=str(entry["recipe"]),
                    divergence={group: float(x) for group, x in entry["divergence"].items()},
                )
                for name, entry in tree.pop("candidates").items()
            }
            return cls(candidates=candidates, **tree)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the file does not hold sensitivities: {error!r}", where=path
            ) from error

    def check(
        self,
        expected: Sensitivity,
        options: Mapping[str, Iterable[str]],
        *,
        where: Path,
    ) -> None:
        """Refuses sensitivities that were not measured on what is here.

        Args:
            expected: What a measurement would say of model, text and recipes; its divergences
                are not looked at.
            options: The candidates of each group.
            where: The file, for the error.

        Raises:
            CheckpointError: Something differs, or is not in the file.
        """
        for what, found, wanted in (
            ("model", self.model, expected.model),
            ("text", self.text, expected.text),
            *(
                (
                    f"recipe {name}",
                    self.candidates[name].recipe if name in self.candidates else "not measured",
                    candidate.recipe,
                )
                for name, candidate in expected.candidates.items()
            ),
        ):
            if found != wanted:
                raise CheckpointError(
                    f"the sensitivities were measured with another {what}",
                    where=where,
                    found=found,
                    allowed=wanted,
                    hint="leave the file out to measure again",
                )
        for group, names in options.items():
            for name in names:
                if name in expected.candidates and group not in self.candidates[name].divergence:
                    raise CheckpointError(
                        "the sensitivities lack a group of layers",
                        where=where,
                        found=f"no {group} for {name}",
                        hint="leave the file out to measure again",
                    )

    def harm(self, group: str, candidate: str) -> float:
        """Returns the divergence that a choice brings; none for a layer left as it is."""
        if candidate not in self.candidates:
            return 0.0
        return self.candidates[candidate].divergence[group]
