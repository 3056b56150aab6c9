"""The walk: original, sensitivity, calibration, quantized, export, exported, report."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from slimtron_common.atomic import atomic_write
from slimtron_common.delivery import deliver, delivered
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.integrations.modelopt_state import is_quantized
from slimtron_common.layerwise import LayerwiseModel, LayerwisePass
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_common.parallel.schedule import LayeredModel
from slimtron_common.progress import stage
from slimtron_common.report import Comparison
from slimtron_common.workdir import WorkDir
from slimtron_quant.calibration.experts import ExpertTokens
from slimtron_quant.calibration.maxima import ForwardLoop
from slimtron_quant.calibration.state import save_calibration
from slimtron_quant.export.kinds import Export, open_export, write_export
from slimtron_quant.export.prepare import prepare_for_export
from slimtron_quant.export.reader import ExportedModel
from slimtron_quant.export.verify import check_agreement
from slimtron_quant.job.comparison import compare
from slimtron_quant.job.mixed import Assignment
from slimtron_quant.job.preflight import Plan
from slimtron_quant.job.sensitivity import measure_sensitivity
from slimtron_quant.mixed.sensitivity import SENSITIVITY_NAME
from slimtron_quant.quantizer import Quantizer, calibration_loop
from slimtron_quant.summary import LayerSummary

__all__ = ["run"]

Load = Callable[[int | None], nn.Module]
"""Returns the model, or with a number that layer of it."""


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
        self._model: nn.Module | None = None
        self._layers: Sequence[int | None] = [None]
        """The parts that are in memory one at a time: all of the model, or each layer."""
        if self.config.layerwise:
            self._layers = range(plan.checkpoint.architecture.num_layers)
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
            evaluation = self._evaluate("original", self._original, record=output.directory)
            output.result = evaluation.to_dict()

    def assign(self) -> None:
        """Stages ``sensitivity-N``, and the choice of every layer's recipe."""
        mixed = self.plan.mixed
        if mixed is None:
            return
        text = self._calibration_text()
        sensitivity = mixed.saved or measure_sensitivity(
            mixed,
            self.context,
            self.work,
            load=self._fresh,
            calibrate=text and text(None),
            micro_batch_size=self.config.quantization.calibration_batch_size,
            vocab_size=self.plan.checkpoint.architecture.vocab_size,
        )
        if mixed.saved is None:
            # It carries the last candidate's quantizers.
            self._release()
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
                self._whole("quantized", self._quantized),
                self.plan.checkpoint.architecture,
                self.context,
                dtype=self._export_dtype,
                companions=self.plan.checkpoint.companion_files(),
            )
        self._release()

    def verify(self) -> None:
        """Stage ``exported``: the files, read back; those for engines without ModelOpt."""
        if self.work.has("exported"):
            return
        self._release()
        exported = self._export()

        def build(layer: int | None) -> nn.Module:
            if layer is None:
                return exported.build(self.context, dtype=self.plan.dtype)
            self._release()
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
        calibrations = [self.work.result(self._calibration(layer)) for layer in self._layers]
        return compare(
            self.plan,
            {
                name: Evaluation.from_dict(self.work.result(name))
                for name in ("original", "quantized", "exported")
            },
            layers=[LayerSummary(**layer) for found in calibrations for layer in found["layers"]],
            mended=[item for found in calibrations for item in found["mended"]],
            experts=[
                ExpertTokens.from_dict(layer) for found in calibrations for layer in found["experts"]
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
        text = self._calibration_text()
        for layer in self._layers:
            key = self._calibration(layer)
            if self.work.has(key):
                continue
            with stage(key), self.work.stage(key) as output:
                quantizer = Quantizer(self._quantization)
                model = quantizer.quantize(self._original(layer), text and text(layer))
                save_calibration(output.directory, model, self.context)
                # Before the next one loads.
                del model
                output.result = {
                    "layers": [layer.to_dict() for layer in quantizer.layers],
                    "mended": [dataclasses.asdict(item) for item in quantizer.mended],
                    "experts": [layer.to_dict() for layer in quantizer.experts],
                }

    def _calibration(self, layer: int | None) -> str:
        return "calibration" if layer is None else f"calibration-{layer:05d}"

    def _calibration_text(self) -> Callable[[int | None], ForwardLoop] | None:
        """What runs the calibration's text through the model or one of its layers."""
        if self.plan.calibration is None:
            return None
        batches = self.plan.calibration.batches(
            self.config.quantization.calibration_batch_size,
            self.context.dp_rank,
            self.context.dp_size,
        )
        if not self.config.layerwise:
            loop = calibration_loop(batches, self.context)
            return lambda _: loop
        text = LayerwisePass(
            self._states("calibration"), batches, self.context, num_layers=len(self._layers)
        )
        return lambda layer: lambda model: text.run(model, layer)

    def _original(self, layer: int | None = None) -> nn.Module:
        """The model, or one of its layers: as it was, or calibrated if that was the last step."""
        if layer is None and self._model is not None:
            return self._model
        self._release()
        checkpoint = self.plan.checkpoint
        with stage("load the model") if layer is None else nullcontext():
            model = build_model(
                checkpoint.architecture,
                self.context,
                dtype=self.plan.dtype,
                layer_spec=self.config.layer_spec,
                layer=layer,
            )
            checkpoint.load(model, self.context)
        if layer is None:
            self._model = model
        return model

    def _quantized(self, layer: int | None = None) -> nn.Module:
        """The same calibrated; what is measured in memory is what will be written."""
        model = self._original(layer)
        if not is_quantized(model):
            directory = self.work.directory(self._calibration(layer))
            Quantizer(self._quantization).restore(model, directory, self.context)
        prepare_for_export(
            model,
            self.plan.checkpoint.architecture,
            dtype=self._export_dtype,
            packs=self.config.export.export_format == "hf",
        )
        return model

    def _fresh(self) -> nn.Module:
        self._release()
        return self._original()

    def _export(self) -> Export:
        return open_export(self.work.directory("export"), layer_spec=self.config.layer_spec)

    @property
    def _export_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.export.torch_dtype)
        return dtype

    def _release(self) -> None:
        self._model = None
        gc.collect()
        torch.cuda.empty_cache()

    def _states(self, name: str) -> Path:
        return self.work.directory(f"{name}-states")

    def _whole(self, name: str, load: Load) -> nn.Module | LayeredModel:
        """The model in memory, or what loads its layers one after the other."""
        if not self.config.layerwise:
            return load(None)
        return LayerwiseModel(load, num_layers=len(self._layers), directory=self._states(name))

    def _evaluate(
        self,
        name: str,
        load: Load,
        references: Mapping[str, Path] = MappingProxyType({}),
        record: Path | None = None,
    ) -> Evaluation:
        return evaluate(
            self._whole(name, load),
            self._evaluation,
            self.context,
            vocab_size=self.plan.checkpoint.architecture.vocab_size,
            references=references,
            record=record,
        )
