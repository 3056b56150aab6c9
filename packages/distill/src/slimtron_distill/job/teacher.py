"""The job's teacher: measured once, and then running along or kept as a cache of its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from slimtron_common.checkpoint.base import read_json
from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.errors import CheckpointError
from slimtron_common.evaluation import Evaluation
from slimtron_common.parallel import ParallelContext
from slimtron_common.progress import stage
from slimtron_common.workdir import WorkDir
from slimtron_distill.cache.fill import fill_cache
from slimtron_distill.cache.store import TeacherCache
from slimtron_distill.cache.task import CachedTask
from slimtron_distill.job.preflight import Plan
from slimtron_distill.model.task import distillation_task
from slimtron_distill.model.teacher import load_teacher
from slimtron_distill.training.task import Task

__all__ = ["JobTeacher"]

_RESULT = "evaluation.json"


class JobTeacher:
    """What the job knows of its teacher, on disk and in memory.

    Args:
        plan: The job.
        context: This process's place.
        work: The job's stages.
        evaluate: Measures a model on the held-out text and records its logits in a directory.
    """

    def __init__(
        self,
        plan: Plan,
        context: ParallelContext,
        work: WorkDir,
        evaluate: Callable[[Sequence[nn.Module], Path], Evaluation],
    ) -> None:
        self._plan, self._context, self._evaluate = plan, context, evaluate
        cache = plan.config.teacher_cache.path
        # Logits are recorded by process, and a resumed run may have another layout.
        layout = f"tp{context.tp_size}-cp{context.cp_size}-dp{context.dp_size}"
        self.record = (
            work.directory(f"teacher-{layout}") if cache is None else cache / f"held-out-{layout}"
        )
        """Its logits on the held-out text."""
        self._chunks: list[nn.Module] | None = None

    def measure(self) -> None:
        """Measures it on the held-out text, unless that was done in this layout."""
        if self.record.is_dir():
            return
        with (
            stage("evaluate the teacher"),
            collective_directory(self.record, self._context) as directory,
        ):
            found = self._evaluate(self._load(), directory)
            if self._context.is_main:
                write_json(directory / _RESULT, found.to_dict())

    def evaluation(self) -> Evaluation:
        """What ``measure`` found."""
        return Evaluation.from_dict(read_json(self.record / _RESULT))

    def prepare(self) -> None:
        """Gets it ready to teach, before the student takes memory."""
        cache = self._open_cache()
        if cache is None:
            self.measure()
            self._load()
            return
        self.measure()
        if cache.missing():
            fill_cache(
                cache,
                self._load(),
                self._plan.training,
                self._context,
                micro_batch_size=self._plan.config.training.micro_batch_size,
            )
        self.release()

    def task(self, student: list[nn.Module]) -> Task:
        """What the student is trained on, after ``prepare``.

        Raises:
            CheckpointError: The cache is damaged.
        """
        plan, cache = self._plan, self._open_cache()
        vocab_size = plan.student.architecture.vocab_size
        if cache is None:
            return distillation_task(
                student,
                self._load(),
                plan.config.distillation,
                self._context,
                vocab_size=vocab_size,
                shared_vocab_size=plan.vocab_size,
                logit_bytes=plan.config.training.logit_bytes,
            )
        if self._context.is_main:
            cache.verify()
        self._context.barrier()
        return CachedTask(
            student, cache, plan.config.distillation, self._context, vocab_size=vocab_size
        )

    def release(self) -> None:
        """Gives its memory back."""
        self._chunks = None

    def _open_cache(self) -> TeacherCache | None:
        path, identity = self._plan.config.teacher_cache.path, self._plan.cache
        if path is None or identity is None:
            return None
        if self._context.is_main:
            TeacherCache.create(path, identity)
        self._context.barrier()
        return TeacherCache(path)

    def _load(self) -> list[nn.Module]:
        plan = self._plan
        if plan.teacher is None:
            raise CheckpointError(
                "the teacher was not measured in this layout",
                where=self.record,
                hint="run once with --teacher, or in the layout that filled the cache",
            )
        if self._chunks is None:
            with stage("load the teacher"):
                self._chunks = load_teacher(
                    plan.teacher,
                    self._context,
                    dtype=plan.dtype,
                    vocab_size=plan.student.architecture.vocab_size,
                    layer_spec=plan.config.layer_spec,
                )
        return self._chunks
