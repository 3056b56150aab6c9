"""Everything that can be refused before the weights load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtron_common.atomic import check_writable
from slimtron_common.checkpoint import Checkpoint
from slimtron_common.data import TokenDataset, check_source, held_out_datasets, token_dataset
from slimtron_common.errors import CheckpointError, ConfigError
from slimtron_common.evaluation.reference import reference_bytes
from slimtron_common.manifest import MANIFEST_NAME, read_manifest
from slimtron_common.memory import check_memory
from slimtron_common.models import Architecture
from slimtron_common.workdir import check_resumable
from slimtron_prune.config import PruningConfig
from slimtron_prune.job.config import PruneJobConfig, ScoreJobConfig
from slimtron_prune.job.opening import OpenModel, open_model
from slimtron_prune.job.transformers_check import check_known
from slimtron_prune.scoring.scores import Scores, load_scores
from slimtron_prune.search.shapes import Space, search_space
from slimtron_prune.targets import target_architecture

__all__ = ["PrunePlan", "ScorePlan", "preflight", "preflight_scores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """A scoring job that may start: every check has passed."""

    config: ScoreJobConfig
    model: OpenModel
    scoring: TokenDataset
    memory: dict[str, int]
    """Bytes of what one process holds at one time."""

    identity: dict[str, Any]
    """What makes this job this job, for ``--resume``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """A pruning job that may start: every check has passed."""

    config: PruneJobConfig
    model: OpenModel
    target: Architecture | None
    """The shape to prune to; None where it is searched."""

    space: Space | None
    """The shapes to search among; None where the target is given."""

    scores: Scores | None
    """Those that were given; None where the job scores, or needs none."""

    scoring: TokenDataset | None
    """The text to score and search on; None where there is neither."""

    evaluation: TokenDataset
    memory: dict[str, int]
    """Bytes of what one process holds at one time."""

    disk: int
    """Bytes of the output and of what is kept until the job is over."""

    identity: dict[str, Any]
    """What makes this job this job, for ``--resume``."""

    @property
    def flops(self) -> float:
        """Floating-point operations of all forward passes, over all processes."""
        tokens = 2 * self.evaluation.tokens.size
        if self.scoring is not None and self.scores is None:
            tokens += self.scoring.tokens.size
        if self.space is not None:
            search = self.config.search
            tokens += search.num_tokens * (search.num_candidates + self.space.num_probes)
        return 2.0 * self.model.checkpoint.num_parameters * tokens


def preflight_scores(
    config: ScoreJobConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    world_size: int | None = None,
) -> ScorePlan:
    """Checks a scoring job against its model, its text, the machine and the disk.

    Args:
        config: The job.
        resume: Whether an unfinished run is to be gone on with.
        overwrite: Whether existing output may be replaced.
        world_size: Processes that the job will have; those that were started without it.

    Raises:
        SlimtronError: What is wrong and what to do, with exit code 2.
    """
    model = open_model(config, world_size)
    model.check_scoring()
    check_writable(config.path, overwrite=overwrite or resume)
    scoring = config.scoring
    memory = model.memory([(scoring.micro_batch_size, scoring.seq_length)], scores=True)
    text = model.scoring_text()
    check_source(text.source, text_field=text.text_field)
    dataset = token_dataset(text, model.checkpoint.tokenizer())
    model.check_sequences("scoring.num_tokens", dataset)
    identity = model.identity(scoring=dataset.fingerprint)
    check_resumable(config.path, identity, resume=resume, overwrite=overwrite)
    return ScorePlan(config=config, model=model, scoring=dataset, memory=memory, identity=identity)


def preflight(
    config: PruneJobConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    world_size: int | None = None,
) -> PrunePlan:
    """Checks a pruning job against its model, its text, the machine and the disk.

    Reads headers, scores and text, never weights. The arguments are those of
    ``preflight_scores``.

    Raises:
        SlimtronError: What is wrong and what to do, with exit code 2.
    """
    model = open_model(config, world_size)
    source, checkpoint = model.architecture, model.checkpoint
    target, space = None, None
    if config.search.has_budget:
        space = search_space(source, config.search, config.parallel, checkpoint.dtype.itemsize)
    else:
        target = _target(source, config.pruning)
        model.check_layout(target)
    scores = None
    if config.scores is not None and config.needs_scores:
        scores = load_scores(config.scores, source)
        _check_scored_model(config.scores, checkpoint)
    evaluation = config.evaluation
    model.check_length("evaluation.seq_length", evaluation.seq_length)
    shapes = [(evaluation.micro_batch_size, evaluation.seq_length)]
    if config.uses_scoring_text:
        model.check_scoring()
        shapes.append((config.scoring.micro_batch_size, config.scoring.seq_length))
    logits = reference_bytes(evaluation.num_tokens, source.vocab_size, model.dtype)
    # Weights that are not named tensors yet are written as such first.
    disk = logits + checkpoint.weight_bytes * (1 if checkpoint.kind == "hf" else 2)
    check_writable(
        config.export.path,
        # A resumed run replaces nothing: its output is not there, or is its own.
        overwrite=overwrite or resume,
        required_bytes=0 if resume else disk,
    )
    memory = model.memory(shapes, scores=config.collects_scores)
    if config.export.check_transformers:
        check_known(source)
        check_memory(
            {"transformers' copy of the model": 4 * checkpoint.num_parameters},
            "cpu",
            hint="free memory, or leave the comparison with transformers out: "
            "--set export.check_transformers=false",
        )
    held_out, scoring = _open_text(config, model)
    identity = model.identity(
        evaluation=held_out.fingerprint,
        scoring=None if scoring is None else scoring.fingerprint,
        scores=None if scores is None else scores.fingerprint,
    )
    check_resumable(config.export.path, identity, resume=resume, overwrite=overwrite)
    return PrunePlan(
        config=config,
        model=model,
        target=target,
        space=space,
        scores=scores,
        scoring=scoring,
        evaluation=held_out,
        memory=memory,
        disk=disk,
        identity=identity,
    )


def _target(source: Architecture, pruning: PruningConfig) -> Architecture:
    try:
        return target_architecture(source, pruning)
    except ConfigError as error:
        # The targets know the fields of their own config; in the job's it has a name.
        if error.where:
            error.where = f"pruning.{error.where}"
        raise


def _open_text(
    config: PruneJobConfig, model: OpenModel
) -> tuple[TokenDataset, TokenDataset | None]:
    evaluation, scoring = config.evaluation, config.scoring
    own = evaluation.source is not None
    held_out = model.text(
        config.text,
        evaluation.num_tokens,
        evaluation.seq_length,
        evaluation.text_field if own else scoring.text_field,
    )
    texts = [held_out, *([model.scoring_text()] if config.uses_scoring_text else [])]
    for text in texts:
        check_source(text.source, text_field=text.text_field)
    tokenizer = model.checkpoint.tokenizer()
    if len(texts) == 1:
        datasets = [token_dataset(held_out, tokenizer)]
    else:
        datasets = list(held_out_datasets(held_out, texts[1], tokenizer))
    wheres = ("evaluation.num_tokens", "scoring.num_tokens")
    for where, dataset in zip(wheres, datasets, strict=False):
        model.check_sequences(where, dataset)
    return datasets[0], datasets[1] if len(datasets) > 1 else None


def _check_scored_model(directory: Path, checkpoint: Checkpoint) -> None:
    """Refuses scores of other weights in the same architecture."""
    if not (directory / MANIFEST_NAME).is_file():
        return
    scored = read_manifest(directory).config.get("model")
    if scored != checkpoint.identity:
        raise CheckpointError(
            "the scores are of other weights",
            where=directory,
            found=scored,
            allowed=checkpoint.identity,
            hint="score this model with `slimtron-prune score`; a copy in another kind of "
            "checkpoint counts as another model",
        )
