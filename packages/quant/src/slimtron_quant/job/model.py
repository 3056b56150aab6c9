"""The model of a job: held whole, or its layers one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.integrations.modelopt_state import is_quantized
from slimtron_common.layerwise import LayerwiseModel, LayerwisePass
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext
from slimtron_common.parallel.schedule import LayeredModel
from slimtron_common.progress import stage
from slimtron_common.workdir import WorkDir
from slimtron_quant.calibration.maxima import ForwardLoop
from slimtron_quant.config import QuantizationConfig
from slimtron_quant.export.prepare import prepare_for_export
from slimtron_quant.job.preflight import Plan
from slimtron_quant.quantizer import Quantizer, calibration_loop

__all__ = ["JobModel"]


class JobModel:
    """Loads what a stage works on: the whole model, or a layer as a pipeline stage of its own.

    Whoever holds a layer lets go of it before the next one loads.

    Args:
        plan: The job.
        context: This process's place.
        work: Where calibrations are kept, and hidden states between layers.
    """

    def __init__(self, plan: Plan, context: ParallelContext, work: WorkDir) -> None:
        self._plan = plan
        self._context = context
        self._work = work
        self._held: nn.Module | None = None
        self.layers: Sequence[int | None] = [None]
        """What is loaded at one time: everything, which is None, or each layer."""
        if plan.config.layerwise:
            self.layers = range(plan.checkpoint.architecture.num_layers)

    def original(self, layer: int | None = None) -> Any:
        """Returns what is held, which may be calibrated by now, or loads it."""
        if self._held is not None:
            return self._held
        plan = self._plan
        self.release()
        with stage("load the model") if layer is None else nullcontext():
            model = build_model(
                plan.checkpoint.architecture,
                self._context,
                dtype=plan.dtype,
                layer_spec=plan.config.layer_spec,
                layer=layer,
            )
            plan.checkpoint.load(model, self._context)
        if layer is None:
            self._held = model
        return model

    def fresh(self) -> Any:
        """Loads the model, whatever was held."""
        self.release()
        return self.original()

    def quantized(self, quantization: QuantizationConfig, layer: int | None = None) -> Any:
        """Returns it calibrated, and as it will be written: that is what is measured."""
        model, config = self.original(layer), self._plan.config
        if not is_quantized(model):
            directory = self._work.directory(self.calibration(layer))
            Quantizer(quantization).restore(model, directory, self._context)
        prepare_for_export(
            model,
            self._plan.checkpoint.architecture,
            dtype=getattr(torch, config.export.torch_dtype),
            packs=config.export.export_format == "hf",
        )
        return model

    def whole(self, name: str, load: Callable[[int | None], Any]) -> nn.Module | LayeredModel:
        """Returns what evaluation and export take for a model.

        Args:
            name: The stage, after which hidden states are named.
            load: Returns all of it, for None, or one layer.
        """
        if not self._plan.config.layerwise:
            model: nn.Module = load(None)
            return model
        return LayerwiseModel(load, num_layers=len(self.layers), directory=self._states(name))

    def calibration(self, layer: int | None) -> str:
        """The stage that calibrates it."""
        return "calibration" if layer is None else f"calibration-{layer:05d}"

    def calibration_text(self) -> Callable[[int | None], ForwardLoop] | None:
        """Returns what runs the calibration's text through each of ``layers``; None for no text."""
        plan, context = self._plan, self._context
        if plan.calibration is None:
            return None
        batches = plan.calibration.batches(
            plan.config.quantization.calibration_batch_size, context.dp_rank, context.dp_size
        )
        if not plan.config.layerwise:
            loop = calibration_loop(batches, context)
            return lambda _: loop
        text = LayerwisePass(
            self._states("calibration"), batches, context, num_layers=len(self.layers)
        )

        def through(layer: int | None) -> ForwardLoop:
            assert layer is not None, "one of `layers`"
            return lambda model: text.run(model, layer)

        return through

    def release(self) -> None:
        """Lets go of what is held."""
        self._held = None
        gc.collect()
        torch.cuda.empty_cache()

    def _states(self, name: str) -> Path:
        return self._work.directory(f"{name}-states")
