"""Importance scores: what pruning decides by, kept apart from any target."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimtron_common.checkpoint.base import read_json
from slimtron_common.config import to_dict
from slimtron_common.errors import CheckpointError
from slimtron_common.models import Architecture

__all__ = ["Scores", "load_scores", "merge_scores", "save_scores", "score_bytes", "score_shapes"]

SUMS_NAME = "scores.safetensors"
MODEL_NAME = "scores.json"


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over the tokens of a text, from which the importance of each part of a model follows.

    As in Minitron (Muralidharan et al. 2024, arXiv:2407.14679) activations tell what is important,
    and layers go by block influence. Where Minitron takes the norm of mean magnitudes, these are
    energies: channels by their squares, heads and experts by the squares of what they add to the
    residual stream. Smaller models keep more of their quality so, and sums over tokens are the
    same however the text is cut into sequences.
    """

    architecture: Architecture
    sums: dict[str, Tensor]
    """float64, whole over all processes, by the names and shapes of ``score_shapes``."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the sums."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            digest.update(name.encode() + self.sums[name].numpy().tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return int(self.sums["num_tokens"])

    @property
    def hidden(self) -> Tensor:
        """Of the residual stream's channels ``[h]``: their energy after all norms."""
        return self.sums["hidden"].sum((0, 1))

    @property
    def ffn(self) -> Tensor:
        """Of the feed-forward channels ``[layers, f]``, or ``[layers, experts, f]``."""
        return self.sums["ffn"]

    @property
    def shared(self) -> Tensor:
        """Of the channels of the expert that serves all tokens ``[layers, f]``."""
        return self.sums["shared"]

    @property
    def heads(self) -> Tensor:
        """Of the query heads ``[layers, heads]``: the energy that each adds."""
        return self.sums["heads"]

    @property
    def mamba_heads(self) -> Tensor:
        """Of the Mamba heads ``[layers, heads]``: the energy that each adds."""
        return self.sums["mamba_heads"]

    @property
    def mamba_channels(self) -> Tensor:
        """Of the Mamba heads' channels ``[layers, heads, p]``: the energy that each adds."""
        return self.sums["mamba_channels"]

    @property
    def experts(self) -> Tensor:
        """Of the experts ``[layers, experts]``: the energy that each adds."""
        return self.sums["experts"]

    def norm_factors(self, kept: Tensor) -> tuple[Tensor, float]:
        """How much smaller root-mean-square norms become when only some channels are left.

        The channels that are kept are the stronger ones: the norm divides by more than it did.
        The norm's weight times this factor makes up for it.

        Args:
            kept: The hidden channels that are left, ``[h]``.

        Returns:
            Of the layers' norms ``[layers, norms]``, and of the final one.
        """

        def factor(energies: Tensor) -> Tensor:
            return (energies[..., kept].mean(-1) / energies.mean(-1)).sqrt()

        return factor(self.sums["residual"]), float(factor(self.sums["final_residual"]))

    def mamba_norm_factors(self, kept: list[Tensor], num_groups: int) -> Tensor:
        """The same of the norm that each group of Mamba heads has before the last projection.

        Args:
            kept: Of each layer, the channels of all heads that are left.
            num_groups: Groups of heads.

        Returns:
            ``[layers, groups]``; 1 where a layer has no such norm.
        """
        factors = []
        for energies, channels in zip(self.sums["mamba_gated"], kept, strict=True):
            before = energies.reshape(num_groups, -1).mean(-1)
            after = energies.reshape(-1)[channels].reshape(num_groups, -1).mean(-1)
            factors.append(torch.where(before > 0, (after / before).sqrt(), 1.0))
        return torch.stack(factors)

    @property
    def layers(self) -> Tensor:
        """Of the layers ``[layers]``: 1 - the cosine between what enters and what leaves."""
        return self.sums["layers"] / self.num_tokens


def score_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums, by name."""
    a, hybrid = architecture, architecture.hybrid
    norms = 2 if hybrid is None else 1
    shapes: dict[str, tuple[int, ...]] = {
        "num_tokens": (),
        "layers": (a.num_layers,),
        # After a layer's norms, and before them.
        "hidden": (a.num_layers, norms, a.hidden_size),
        "residual": (a.num_layers, norms, a.hidden_size),
        "final_residual": (a.hidden_size,),
        "heads": (a.num_layers, a.num_attention_heads),
    }
    if hybrid is not None:
        heads = (a.num_layers, hybrid.mamba_num_heads)
        shapes["mamba_heads"] = heads
        shapes["mamba_channels"] = shapes["mamba_gated"] = (*heads, hybrid.mamba_head_dim)
    if a.moe is None:
        return {**shapes, "ffn": (a.num_layers, a.ffn_hidden_size)}
    experts = (a.num_layers, a.moe.num_experts)
    shapes |= {"experts": experts, "ffn": (*experts, a.ffn_hidden_size)}
    if a.moe.shared_ffn_hidden_size is not None:
        shapes["shared"] = (a.num_layers, a.moe.shared_ffn_hidden_size)
    return shapes


def score_bytes(architecture: Architecture) -> int:
    """Bytes that the sums take."""
    return sum(8 * math.prod(shape) for shape in score_shapes(architecture).values())


def merge_scores(parts: Iterable[Scores]) -> Scores:
    """Adds the sums over several texts, in their order."""
    first, *rest = parts
    sums = dict(first.sums)
    for part in rest:
        sums = {name: value + part.sums[name] for name, value in sums.items()}
    return Scores(first.architecture, sums)


def save_scores(directory: Path, scores: Scores) -> None:
    """Writes scores into an existing directory."""
    save_file(scores.sums, directory / SUMS_NAME)
    text = json.dumps({"architecture": _identity(scores.architecture)}, indent=2)
    (directory / MODEL_NAME).write_text(text + "\n", encoding="utf-8")


def load_scores(directory: Path, architecture: Architecture) -> Scores:
    """Reads what ``save_scores`` wrote.

    Args:
        directory: Where the scores lie.
        architecture: The model that they are to be used for.

    Raises:
        CheckpointError: There are none, they are damaged, or they are of another model.
    """
    if not directory.is_dir():
        raise CheckpointError(
            "there are no scores",
            where=directory,
            hint="`slimtron-prune score` writes them",
        )
    scored = read_json(directory / MODEL_NAME).get("architecture")
    if not isinstance(scored, dict):
        raise CheckpointError("the scores do not say of which model", where=directory / MODEL_NAME)
    wanted = _identity(architecture)
    differing = sorted(name for name in wanted if scored.get(name) != wanted[name])
    if differing:
        raise CheckpointError(
            "the scores are of another model",
            where=directory,
            found=", ".join(f"{name} {scored.get(name)!r}" for name in differing[:3]),
            allowed=", ".join(f"{name} {wanted[name]!r}" for name in differing[:3]),
            hint="score this model with `slimtron-prune score`",
        )
    try:
        sums = load_file(directory / SUMS_NAME)
    except Exception as error:  # safetensors raises its own and the system's
        raise CheckpointError(
            f"the scores cannot be read: {error}", where=directory / SUMS_NAME
        ) from error
    shapes = score_shapes(architecture)
    found = {name: tuple(value.shape) for name, value in sums.items()}
    if found != shapes or not all(bool(torch.isfinite(value).all()) for value in sums.values()):
        raise CheckpointError(
            "the scores have other shapes than the model, or are not finite",
            where=directory / SUMS_NAME,
            found=found,
            allowed=shapes,
        )
    return Scores(architecture, sums)


def _identity(architecture: Architecture) -> dict[str, Any]:
    """What two checkpoints of one model have in common."""
    # Not the type of the weights, nor what else config.json says.
    values = to_dict(architecture)
    return {name: values[name] for name in values if name not in ("dtype", "hf_extras")}
