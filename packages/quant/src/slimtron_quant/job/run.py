"""The walk: original, sensitivity, calibration, quantized, export, exported, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from slimtron_common.atomic import atomic_write
from slimtron_common.delivery import deliver, delivered
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.layerwise import quick_collection
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.progress import stage
from slimtron_common.report import Comparison
from slimtron_common.workdir import WorkDir
from slimtron_quant.calibration.experts import ExpertTokens
from slimtron_quant.calibration.state import save_calibration
from slimtron_quant.export.kinds import Export, open_export, write_export
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.export.verify import check_agreement
from slimtron_quant.job.comparison import compare
from slimtron_quant.job.mixed import Assignment
from slimtron_quant.job.model import JobModel
from slimtron_quant.job.preflight import Plan
from slimtron_quant.job.sensitivity import measure_sensitivity
from slimtron_quant.mixed.sensitivity import SENSITIVITY_NAME
from slimtron_quant.quantizer import Quantizer
from slimtron_quant.summary import LayerSummary

__all__ = ["run"]


def run(plan: Plan, *, resume: bool = False, overwrite: bool = False) -> Comparison:
    """Quantizes, proves, exports, reloads and reports.

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
        VerificationError: The export, reloaded, is not the model in memory. The output does not
            appear; the files are kept in the work directory.
    """
    config = plan.config
    done = delivered(config.output, plan.identity) if resume else None
    with initialize_parallel(config.parallel, device=plan.device, seed=config.seed) as context:
        work = WorkDir(config.output, plan.identity, context, resume=resume)
        if done is None:
            job = _Job(plan, context, work)
            with quick_collection() if config.layerwise else nullcontext():
                job.measure_original()
                job.assign()
                job.quantize()
                job.verify()
            done = job.comparison()
            if context.is_main:
                job.publish(done, overwrite=overwrite)
        work.remove()
    return done


class _Job:
    """The stages of one run. Each looks first whether it is finished."""

    def __init__(self, plan: Plan, context: ParallelContext, work: WorkDir) -> None:
        self.plan = plan
        self.config = plan.config
        self.context = context
        self.work = work
        self._model = JobModel(plan, context, work)
        self._quantization = plan.config.quantization
        self._assignment: Assignment | None = None
        micro_batch_size = self.config.evaluation.micro_batch_size
        self._evaluation = plan.evaluation.batches(
            micro_batch_size, context.dp_rank, context.dp_size
        )

    def measure_original(self) -> None:
        """Stage ``original``: the model as it was, its logits recorded."""
        if self.work.has("original"):
            return
        with stage("original: evaluate"), self.work.stage("original") as output:
            evaluation = self._evaluate("original", self._model.original, record=output.directory)
            output.result = evaluation.to_dict()

    def assign(self) -> None:
        """Stages ``sensitivity-N``, and the choice of every layer's recipe."""
        mixed = self.plan.mixed
        if mixed is None:
            return
        text = self._model.calibration_text()
        sensitivity = mixed.saved or measure_sensitivity(
            mixed,
            self.context,
            self.work,
            load=self._model.fresh,
            calibrate=text and text(None),
            micro_batch_size=self.config.quantization.calibration_batch_size,
            vocab_size=self.plan.checkpoint.architecture.vocab_size,
        )
        if mixed.saved is None:
            # It carries the last candidate's quantizers.
            self._model.release()
        self._assignment = mixed.assign(sensitivity)
        self._quantization = self._assignment.quantization

    def quantize(self) -> None:
        """Stages ``calibration``, ``quantized`` and ``export``."""
        if self.work.has("export"):
            return
        self._calibrate()
        if not self.work.has("quantized"):
            with stage("quantized: evaluate"), self.work.stage("quantized") as output:
                references = {"original": self.work.directory("original")}
                evaluation = self._evaluate(
                    "quantized", self._quantized, references, record=output.directory
                )
                output.result = evaluation.to_dict()
        with stage("export"), self.work.stage("export") as output:
            write_export(
                self.config.export.export_format,
                output.directory,
                self._model.whole("quantized", self._quantized),
                self.plan.checkpoint.architecture,
                self.context,
                dtype=getattr(torch, self.config.export.torch_dtype),
                companions=self.plan.checkpoint.companion_files(),
            )
        self._model.release()

    def verify(self) -> None:
        """Stage ``exported``: the files, read back; those for engines without ModelOpt."""
        if self.work.has("exported"):
            return
        self._model.release()
        exported = self._export()

        def build(layer: int | None) -> Any:
            if layer is None:
                return exported.build(self.context, dtype=self.plan.dtype)
            self._model.release()
            assert isinstance(exported, ExportedModel), "the only format that is written by layers"
            return exported.build(self.context, dtype=self.plan.dtype, layer=layer)

        with stage("export: reload and evaluate"), self.work.stage("exported") as output:
            references = {
                "original": self.work.directory("original"),
                "memory": self.work.directory("quantized"),
            }
            evaluation = self._evaluate("exported", build, references)
            check_agreement(
                Evaluation.from_dict(self.work.result("quantized")),
                evaluation,
                where=self.work.directory("export"),
            )
            output.result = evaluation.to_dict()

    def comparison(self) -> Comparison:
        """Reads every stage's outcome into one comparison."""
        calibrations = [
            self.work.result(self._model.calibration(layer)) for layer in self._model.layers
        ]
        return compare(
            self.plan,
            {
                name: Evaluation.from_dict(self.work.result(name))
                for name in ("original", "quantized", "exported")
            },
            layers=[LayerSummary(**layer) for found in calibrations for layer in found["layers"]],
            mended=[item for found in calibrations for item in found["mended"]],
            experts=[
                ExpertTokens.from_dict(layer)
                for found in calibrations
                for layer in found["experts"]
            ],
            exported=self._export(),
            assignment=self._assignment,
        )

    def publish(self, comparison: Comparison, *, overwrite: bool) -> None:
        """Adds report and manifest to the export and gives it its name."""
        directory = self.work.directory("export")
        if self._assignment is not None:
            text = self._assignment.sensitivity.to_json()
            atomic_write(directory / SENSITIVITY_NAME, text)
        deliver(
            directory,
            self.config.output,
            comparison,
            self.plan.identity,
            kind="quantized",
            seed=self.config.seed,
            overwrite=overwrite,
        )

    def _calibrate(self) -> None:
        """Stage ``calibration``, or one for each layer."""
        text = self._model.calibration_text()
        for layer in self._model.layers:
            key = self._model.calibration(layer)
            if self.work.has(key):
                continue
            with stage(key), self.work.stage(key) as output:
                quantizer = Quantizer(self._quantization)
                model = quantizer.quantize(self._model.original(layer), text and text(layer))
                save_calibration(output.directory, model, self.context)
                # Before the next one loads.
                del model
                output.result = {
                    "layers": [layer.to_dict() for layer in quantizer.layers],
                    "mended": [dataclasses.asdict(item) for item in quantizer.mended],
                    "experts": [layer.to_dict() for layer in quantizer.experts],
                }

    def _quantized(self, layer: int | None) -> Any:
        return self._model.quantized(self._quantization, layer)

    def _export(self) -> Export:
        return open_export(self.work.directory("export"), layer_spec=self.config.layer_spec)

    def _evaluate(
        self,
        name: str,
        load: Callable[[int | None], Any],
        references: Mapping[str, Path] = MappingProxyType({}),
        record: Path | None = None,
    ) -> Evaluation:
        return evaluate(
            self._model.whole(name, load),
            self._evaluation,
            self.context,
            vocab_size=self.plan.checkpoint.architecture.vocab_size,
            references=references,
            record=record,
        )
