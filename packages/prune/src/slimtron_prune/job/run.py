"""The walk: original, scores, search, pruned, reloaded, report."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from slimtron_common.checkpoint import Checkpoint, open_checkpoint
from slimtron_common.checkpoint.base import CONFIG_NAME
from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.checkpoint.kinds import KIND_OF_FORMAT, WRITERS
from slimtron_common.checkpoint.writer import copy_files, write_safetensors
from slimtron_common.data import TokenDataset
from slimtron_common.delivery import deliver, delivered
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.models import Architecture
from slimtron_common.models.huggingface import config_from_architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.progress import stage
from slimtron_common.report import Comparison
from slimtron_common.workdir import WorkDir
from slimtron_prune.cutting import Cutter
from slimtron_prune.job.candidates import measure_selection, shape_name
from slimtron_prune.job.comparison import compare, describe_scores
from slimtron_prune.job.preflight import PrunePlan, ScorePlan
from slimtron_prune.job.score import score_in_parts
from slimtron_prune.job.source import load_model, tensor_reader
from slimtron_prune.job.transformers_check import check_against_transformers
from slimtron_prune.scoring.scores import Scores, save_scores
from slimtron_prune.search.rank import SearchResult, search
from slimtron_prune.selection import Selection, select, select_layers

__all__ = ["run", "run_scores"]


def run_scores(plan: ScorePlan, *, resume: bool = False, overwrite: bool = False) -> Comparison:
    """Scores a model and writes the scores with a report.

    Args:
        plan: What ``preflight_scores`` returned.
        resume: Whether to go on with an unfinished run.
        overwrite: Whether an existing output is replaced.

    Returns:
        The report, on every process.
    """
    config, model = plan.config, plan.model
    done = delivered(config.path, plan.identity) if resume else None
    with initialize_parallel(config.parallel, device=model.device, seed=config.seed) as context:
        work = WorkDir(config.path, plan.identity, context, resume=resume)
        if done is None:
            loaded: list[nn.Module] = []

            def load() -> nn.Module:
                if not loaded:
                    loaded.append(load_model(model, context))
                return loaded[0]

            scores = score_in_parts(model, plan.scoring, load, context, work)
            done = describe_scores(plan, scores)
            with work.stage("output") as output:
                if context.is_main:
                    save_scores(output.directory, scores)
            if context.is_main:
                deliver(
                    work.directory("output"),
                    config.path,
                    done,
                    plan.identity,
                    kind="scores",
                    seed=config.seed,
                    overwrite=overwrite,
                )
        work.remove()
    return done


def run(plan: PrunePlan, *, resume: bool = False, overwrite: bool = False) -> Comparison:
    """Scores, cuts, reloads, proves and reports.

    Every stage's outcome is kept beside the output until the job is over; with ``resume`` the
    finished ones are not done again, and the output has the same bytes as that of an
    undisturbed run.

    Args:
        plan: What ``preflight`` returned.
        resume: Whether to go on with an unfinished run.
        overwrite: Whether an existing output is replaced.

    Returns:
        The before/after comparison, on every process.

    Raises:
        SlimtronError: With the stage's own message; what was finished before stays.
        VerificationError: transformers computes something else from the files. The output does
            not appear; the files are kept in the work directory.
    """
    config = plan.config
    path = config.export.path
    done = delivered(path, plan.identity) if resume else None
    device = plan.model.device
    with initialize_parallel(config.parallel, device=device, seed=config.seed) as context:
        work = WorkDir(path, plan.identity, context, resume=resume)
        if done is None:
            job = _Job(plan, context, work)
            job.measure_original()
            scores = job.score()
            found = job.search(scores)
            selection = job.select(scores, found)
            job.prune(selection)
            job.reload(selection.target)
            done = job.comparison(selection, scores, found)
            if context.is_main:
                deliver(
                    work.directory(job.delivered),
                    path,
                    done,
                    plan.identity,
                    kind="pruned",
                    seed=config.seed,
                    overwrite=overwrite,
                )
        work.remove()
    return done


class _Job:
    """The stages of one run. Each looks first whether it is finished."""

    def __init__(self, plan: PrunePlan, context: ParallelContext, work: WorkDir) -> None:
        self.plan = plan
        self.config = plan.config
        self.model = plan.model
        self.context = context
        self.work = work
        self._loaded: nn.Module | None = None

    def measure_original(self) -> None:
        """Stage ``original``: the model as it was, its logits recorded."""
        if self.work.has("original"):
            return
        with stage("original: evaluate"), self.work.stage("original") as output:
            evaluation = self._evaluate(
                self._original(), self.model.architecture, record=output.directory
            )
            output.result = evaluation.to_dict()

    def score(self) -> Scores | None:
        """Stages ``scores-*``: what is important; None where layers go by number."""
        if not self.config.collects_scores:
            return self.plan.scores
        assert self.plan.scoring is not None, "the preflight opens the text"
        return score_in_parts(
            self.model, self.plan.scoring, self._original, self.context, self.work
        )

    def search(self, scores: Scores | None) -> SearchResult | None:
        """Stages ``measured-*``: the shapes that were cut and measured for the budget."""
        space = self.plan.space
        self._release()
        if space is None:
            return None
        assert scores is not None, "a search goes by scores"
        assert self.plan.scoring is not None, "the preflight opens the text"
        wanted = -(-self.config.search.num_tokens // self.plan.scoring.seq_length)
        rounds = -(-wanted // self.context.dp_size)
        count = min(rounds * self.context.dp_size, self.plan.scoring.num_sequences)
        text = TokenDataset(self.plan.scoring.tokens[:count])
        batches = text.batches(
            self.config.scoring.micro_batch_size, self.context.dp_rank, self.context.dp_size
        )

        def measure(shape: Architecture) -> float:
            selection = select(shape, scores)
            name = f"measured-{shape_name(selection)}"
            if not self.work.has(name):
                with self.work.stage(name) as output:
                    found = measure_selection(
                        selection,
                        self._read,
                        batches,
                        self.context,
                        dtype=self.model.dtype,
                        layer_spec=self.config.layer_spec,
                    )
                    output.result = found.to_dict()
            return Evaluation.from_dict(self.work.result(name)).loss

        with stage("search"):
            return search(space, scores, measure, self.config.search.num_candidates)

    def select(self, scores: Scores | None, found: SearchResult | None) -> Selection:
        """Decides what is kept."""
        target = self.plan.target if found is None else found.best.shape
        assert target is not None, "there is a target or a search"
        if self.config.pruning.drop_layers is not None:
            dropped = set(self.config.pruning.drop_layers)
            return select_layers(self.model.architecture, target, dropped)
        assert scores is not None, "what is kept goes by scores"
        return select(target, scores)

    def prune(self, selection: Selection) -> None:
        """Stages ``pruned`` and ``megatron`` or ``nemo``: the smaller model on disk."""
        if not self.work.has("pruned"):
            self._release()
            companions = self.model.checkpoint.companion_files()
            with stage("cut"), self.work.stage("pruned") as output:
                tensors = Cutter(selection).tensors(self._read) if self.context.is_main else ()
                write_safetensors(output.directory, tensors, self.context)
                if self.context.is_main:
                    config = config_from_architecture(selection.target)
                    write_json(output.directory / CONFIG_NAME, config)
                    copy_files(companions, output.directory)
        if self.delivered != "pruned" and not self.work.has(self.delivered):
            pruned = open_checkpoint(f"hf:{self.work.directory('pruned')}")
            model = self._load(pruned, pruned.dtype)
            written = self.work.stage(self.delivered)
            with stage("write the distributed checkpoint"), written as output:
                WRITERS[self._kind](
                    output.directory,
                    model,
                    selection.target,
                    self.context,
                    companions=pruned.companion_files(),
                )

    @property
    def delivered(self) -> str:
        """The stage that becomes the output."""
        written = self.config.export.export_format
        return "pruned" if written == "hf" else written

    @property
    def _kind(self) -> str:
        return KIND_OF_FORMAT[self.config.export.export_format]

    def reload(self, target: Architecture) -> None:
        """Stage ``reloaded``: the files, read back, by transformers, too."""
        if self.work.has("reloaded"):
            return
        with stage("reload and evaluate"), self.work.stage("reloaded") as output:
            directory = self.work.directory(self.delivered)
            checkpoint = open_checkpoint(f"{self._kind}:{directory}")
            model = self._load(checkpoint, self.model.dtype)
            references = {"original": self.work.directory("original")}
            evaluation = self._evaluate(model, target, references)
            difference = None
            if self.config.export.check_transformers:
                difference = check_against_transformers(
                    self.work.directory("pruned"), model, target, self.context
                )
            output.result = {
                "evaluation": evaluation.to_dict(),
                "transformers_difference": difference,
                "weight_bytes": checkpoint.weight_bytes,
            }

    def comparison(
        self, selection: Selection, scores: Scores | None, found: SearchResult | None
    ) -> Comparison:
        """Reads every stage's outcome into one comparison."""
        reloaded = self.work.result("reloaded")
        return compare(
            self.plan,
            selection,
            original=Evaluation.from_dict(self.work.result("original")),
            pruned=Evaluation.from_dict(reloaded["evaluation"]),
            weight_bytes=reloaded["weight_bytes"],
            transformers_difference=reloaded["transformers_difference"],
            scores=scores,
            found=found,
        )

    @cached_property
    def _read(self) -> Callable[[str], Tensor]:
        return tensor_reader(self.model, self.context, self.work)

    def _original(self) -> nn.Module:
        if self._loaded is None:
            self._loaded = load_model(self.model, self.context)
        return self._loaded

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        model = build_model(
            checkpoint.architecture,
            self.context,
            dtype=dtype,
            layer_spec=self.config.layer_spec,
        )
        checkpoint.load(model, self.context)
        return model

    def _release(self) -> None:
        self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def _evaluate(
        self,
        model: nn.Module,
        architecture: Architecture,
        references: Mapping[str, Path] = MappingProxyType({}),
        record: Path | None = None,
    ) -> Evaluation:
        batches = self.plan.evaluation.batches(
            self.config.evaluation.micro_batch_size, self.context.dp_rank, self.context.dp_size
        )
        return evaluate(
            model,
            batches,
            self.context,
            vocab_size=architecture.vocab_size,
            references=references,
            record=record,
        )
