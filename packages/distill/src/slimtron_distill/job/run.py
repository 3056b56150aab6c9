"""The walk: teacher, student at the start, training, student at the end, export, reload, report."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.kinds import KIND_OF_FORMAT, WRITERS
from slimtron_common.delivery import deliver, delivered
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.progress import stage
from slimtron_common.report import Comparison
from slimtron_common.workdir import WorkDir
from slimtron_distill.job.comparison import compare
from slimtron_distill.job.preflight import Plan
from slimtron_distill.job.teacher import JobTeacher
from slimtron_distill.job.verify import check_agreement
from slimtron_distill.training.checkpoint import TrainingCheckpoints
from slimtron_distill.training.log import TrainingLog, read_log
from slimtron_distill.training.loop import Intervals, train
from slimtron_distill.training.recompute import RECOMPUTE
from slimtron_distill.training.stream import BatchStream
from slimtron_distill.training.trainer import Trainer

__all__ = ["CHECKPOINTS", "LOG_NAME", "build_student", "run"]

CHECKPOINTS = "checkpoints"
LOG_NAME = "train.jsonl"


def run(plan: Plan, *, resume: bool = False, overwrite: bool = False) -> Comparison:
    """Distills, proves, exports, reloads and reports.

    Args:
        plan: What ``preflight`` returned.
        resume: Whether to go on with an unfinished run, in this layout or another.
        overwrite: Whether an existing output is replaced.

    Returns:
        The comparison of student and teacher, on every process.

    Raises:
        SlimtronError: With the stage's own message; what was finished before stays.
        VerificationError: The export, reloaded, is not the model in memory. The output does not
            appear; the files are kept in the work directory.
    """
    config = plan.config
    done = delivered(config.output, plan.identity) if resume else None
    with initialize_parallel(
        config.parallel,
        device=plan.device,
        seed=config.seed,
        virtual_pipeline_size=config.virtual_pipeline_size,
    ) as context:
        work = WorkDir(config.output, plan.identity, context, resume=resume)
        if done is None:
            job = _Job(plan, context, work)
            if not work.has("export"):
                job.train()
            job.verify()
            done = job.comparison()
            if context.is_main:
                job.publish(done, overwrite=overwrite)
        work.remove()
    return done


def build_student(plan: Plan, context: ParallelContext) -> list[nn.Module]:
    """Builds this process's part of the student and fills it from its checkpoint."""
    chunks = build_chunks(
        plan.student.architecture,
        context,
        dtype=plan.dtype,
        layer_spec=plan.config.layer_spec,
        settings=RECOMPUTE[plan.config.training.recompute],
    )
    for chunk in chunks:
        plan.student.load(chunk, context)
    return chunks


class _Job:
    """The stages of one run. Each looks first whether it is finished."""

    def __init__(self, plan: Plan, context: ParallelContext, work: WorkDir) -> None:
        self.plan = plan
        self.config = plan.config
        self.context = context
        self.work = work
        self._held_out = plan.held_out.batches(
            self.config.evaluation.micro_batch_size, context.dp_rank, context.dp_size
        )
        self.teacher = JobTeacher(
            plan, context, work, lambda model, record: self._evaluate(model, {}, record)
        )

    def train(self) -> None:
        """Stages ``teacher``, ``start``, the training, ``student`` and ``export``."""
        self.teacher.prepare()
        with stage("load the student"):
            student = build_student(self.plan, self.context)
        if not self.work.has("start"):
            with stage("evaluate the student"), self.work.stage("start") as output:
                output.result = self._evaluate(student, self._references).to_dict()
        trainer = Trainer(
            self.teacher.task(student),
            self.context,
            training=self.config.training,
            optimizer=self.config.optimizer,
            guard=self.config.guard,
            seed=self.config.seed,
        )
        self._train(trainer)
        _round(student, self.plan.export_dtype)
        if not self.work.has("student"):
            with stage("evaluate the distilled student"), self.work.stage("student") as output:
                output.result = self._evaluate(student, self._references).to_dict()
        with stage("export"), self.work.stage("export") as output:
            self._write(student, output.directory)
            if self.context.is_main:
                shutil.copyfile(self.work.path / LOG_NAME, output.directory / LOG_NAME)

    def verify(self) -> None:
        """Stage ``exported``: the files, read back into a new model."""
        if self.work.has("exported"):
            return
        # A run that ended between export and verification may have had another layout.
        self.teacher.measure()
        self.teacher.release()
        gc.collect()
        torch.cuda.empty_cache()
        with stage("reload the export and evaluate"), self.work.stage("exported") as output:
            directory = self.work.directory("export")
            checkpoint = open_checkpoint(
                f"{KIND_OF_FORMAT[self.config.export.export_format]}:{directory}"
            )
            model = build_chunks(
                checkpoint.architecture,
                self.context,
                dtype=self.plan.dtype,
                layer_spec=self.config.layer_spec,
            )
            for chunk in model:
                checkpoint.load(chunk, self.context)
            found = self._evaluate(model, self._references)
            memory = Evaluation.from_dict(self.work.result("student"))
            check_agreement(memory, found, where=directory)
            output.result = found.to_dict()

    def comparison(self) -> Comparison:
        """Reads every stage's outcome into one comparison."""
        return compare(
            self.plan,
            start=Evaluation.from_dict(self.work.result("start")),
            student=Evaluation.from_dict(self.work.result("exported")),
            teacher=self.teacher.evaluation(),
            records=read_log(self.work.directory("export") / LOG_NAME),
        )

    def publish(self, comparison: Comparison, *, overwrite: bool) -> None:
        """Adds report and manifest to the export and gives it its name."""
        directory = self.work.directory("export")
        deliver(
            directory,
            self.config.output,
            comparison,
            self.plan.identity,
            kind="distilled",
            seed=self.config.seed,
            overwrite=overwrite,
        )

    def _train(self, trainer: Trainer) -> None:
        config, training = self.config, self.config.training
        checkpoints = TrainingCheckpoints(
            self.work.path / CHECKPOINTS, self.context, config.checkpoints
        )
        checkpoints.load_latest(trainer)
        log = None
        if self.context.is_main:
            path = self.work.path / LOG_NAME
            log = TrainingLog(path, step=trainer.step, tensorboard=config.logging.tensorboard)
        stream = BatchStream(self.plan.training, training, self.context, seed=config.seed)
        with stage("train"):
            train(
                trainer,
                stream,
                checkpoints,
                log,
                steps=training.steps,
                intervals=Intervals(
                    log=config.logging.interval,
                    checkpoint=config.checkpoints.interval,
                    evaluation=config.logging.evaluation_interval,
                ),
                evaluate=lambda: self._validate(trainer),
            )
        if log is not None:
            log.close()

    def _validate(self, trainer: Trainer) -> dict[str, float]:
        found = self._evaluate(trainer.task.student_chunks, self._references)
        return {
            "validation_perplexity": found.perplexity,
            "validation_kl": found.distances["teacher"].kl,
            "validation_agreement": found.distances["teacher"].agreement,
        }

    @property
    def _references(self) -> dict[str, Path]:
        return {"teacher": self.teacher.record}

    def _evaluate(
        self,
        model: Sequence[nn.Module],
        references: Mapping[str, Path],
        record: Path | None = None,
    ) -> Evaluation:
        for chunk in model:
            chunk.eval()
        return evaluate(
            list(model),
            self._held_out,
            self.context,
            vocab_size=self.plan.vocab_size,
            references=references,
            record=record,
        )

    def _write(self, student: list[nn.Module], directory: Path) -> None:
        kind = KIND_OF_FORMAT[self.config.export.export_format]
        options: dict[str, Any] = {}
        if kind == "hf":
            options["dtype"] = self.plan.export_dtype
        WRITERS[kind](
            directory,
            nn.ModuleList(student),
            self.plan.student.architecture,
            self.context,
            companions=self.plan.student.companion_files(),
            **options,
        )


@torch.no_grad()
def _round(model: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Rounds the weights as writing them will, so that what is measured is what is written."""
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(dtype))
