"""Quantize a Megatron model in memory: the contract of NeMo 2's ``Quantizer``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.kinds import kind_of
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.data import token_dataset
from slimtron_common.data.config import DataConfig
from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import (
    functions_put_back,
    shared_experts,
    to_modelopt,
)
from slimtron_common.integrations.modelopt_state import quiet_modelopt
from slimtron_common.integrations.nemo import describe_with_nemo
from slimtron_common.models.adjustments import weight_expert_outputs
from slimtron_common.models.hybrid import refuse_hybrid
from slimtron_common.models.megatron import architecture_of
from slimtron_common.parallel import ParallelContext, forward_only, unwrap_model
from slimtron_common.progress import Progress
from slimtron_quant.awq import awq_calibrate
from slimtron_quant.calibration.experts import (
    ExpertTokens,
    RoutedTokens,
    expert_modules,
    warn_of_short_experts,
)
from slimtron_quant.calibration.floors import floor_input_scales
from slimtron_quant.calibration.kv_cache import (
    check_kv_quantizers,
    raise_kv_scales,
    register_attention,
)
from slimtron_quant.calibration.maxima import ForwardLoop, collecting_maxima
from slimtron_quant.calibration.scales import MendedScale, check_scales
from slimtron_quant.calibration.state import restore_calibration
from slimtron_quant.config import ExportConfig, QuantizationConfig
from slimtron_quant.errors import CalibrationError
from slimtron_quant.export.kinds import write_export
from slimtron_quant.nemo import check_nemo_opens_quantizers
from slimtron_quant.recipes import Scheme, quantization_scheme
from slimtron_quant.summary import (
    LayerSummary,
    expert_range,
    global_name,
    layer_offset,
    summarize,
)

__all__ = ["Quantizer", "calibration_loop"]

logger = logging.getLogger(__name__)

Algorithm = str | Mapping[str, Any] | None


class Quantizer:
    """Post-training quantization of Megatron-Core and NeMo 2 models.

    Takes the place of ``nemo.collections.llm.modelopt.Quantizer``. Runs on GPUs and, inside
    ``slimtron_common.backend.cpu_backend()``, on the CPU; Megatron's model-parallel groups must
    exist (``slimtron_common.initialize_parallel`` or a trainer sets them up).

    Args:
        quantization_config: What to quantize to.
        export_config: Where ``export`` writes; not needed for ``quantize`` alone.
    """

    def __init__(
        self,
        quantization_config: QuantizationConfig,
        export_config: ExportConfig | None = None,
    ) -> None:
        self.quantization_config = quantization_config
        self.export_config = export_config
        self.layers: list[LayerSummary] = []
        """After ``quantize``: every linear layer's format and the noise in its weights."""
        self.mended: list[MendedScale] = []
        """After ``quantize``: the scales that were missing or too small and had to be mended."""
        self.experts: list[ExpertTokens] = []
        """After ``quantize``: the calibration tokens of every expert, by layer; none for a dense
        model and for recipes that only round weights."""

    def quantize(self, model: Any, forward_loop: ForwardLoop | None = None) -> Any:
        """Quantizes a model in place and calibrates it.

        Args:
            model: A Megatron-Core model or what holds it: NeMo's ``MegatronParallel``, a
                Lightning ``GPTModel``, Megatron's wrappers. Evaluation mode is set meanwhile.
            forward_loop: Runs the calibration text through the model that it is given. Without
                one, ``calibration_dataset`` is tokenized by ``model.tokenizer`` and run
                through Megatron's schedule; recipes that only round weights need neither.

        Returns:
            ``model``, its linear layers computing in the recipe's precision, its attention
            reading keys and values as they come out of a quantized KV cache.

        Raises:
            ConfigError: The settings do not fit the model, or there is nothing to calibrate
                with. The model is untouched.
            UnsupportedModelError: The model is a hybrid and untouched; or the layer spec has no
                place for quantizers of the KV cache. The model then carries quantizers and has to
                be loaded again.
            CalibrationError: A scale came out unusable, or the forward loop failed. The model
                carries quantizers and has to be loaded again.
        """
        config = self.quantization_config
        if config.algorithm is None and not config.enable_kv_cache:
            logger.info("algorithm is None, no KV cache: the model stays as it is")
            return model
        megatron = unwrap_model(model)
        context = ParallelContext.from_megatron(device=next(megatron.parameters()).device)
        scheme = self._scheme(megatron, context)
        scheme.check_device(context.device.type)
        if scheme.needs_calibration and forward_loop is None:
            forward_loop = self._default_forward_loop(model, context)
        routed = RoutedTokens(megatron, to_all=self.quantization_config.calibrate_all_experts)
        calibration = self._attach(megatron, scheme)
        loop = None
        if scheme.needs_calibration and forward_loop is not None:
            loop = routed.during(forward_loop)
        with quiet_modelopt():
            self._calibrate(megatron, calibration, loop)
        self.experts = routed.result(context)
        self._finish(megatron, context, scheme)
        return model

    def restore(self, model: Any, directory: Path, context: ParallelContext) -> Any:
        """Quantizes a model with the calibration that ``save_calibration`` kept.

        Args:
            model: The same original model in the same layout.
            directory: Where the calibration lies.
            context: This process's place.

        Raises:
            CheckpointError: The calibration cannot be read or belongs to another model.
        """
        megatron = unwrap_model(model)
        self._attach(megatron, self._scheme(megatron, context))
        restore_calibration(directory, megatron, context)
        return model

    def export(self, model: Any, model_dir: str | Path, trainer: Any = None) -> Path:
        """Writes the quantized model as ``export_config.export_format`` says.

        Every process calls it; the directory appears whole or not at all. Before it is written,
        factors on inputs are folded away where that is exact, and what is written in another
        type is rounded to it, in ``model`` too.

        Args:
            model: What ``quantize`` returned.
            model_dir: The directory of the original model, of any kind: its config and tokenizer
                go along.
            trainer: NeMo's; with it a checkpoint in ``nemo`` tells all that NeMo knows of the
                model, without it what the original's architecture does.

        Returns:
            The directory.

        Raises:
            ConfigError: There is no ``export_config``.
            CheckpointError: The directory exists or cannot be written.
            MissingDependencyError: ModelOpt is too old for this kind of export.
        """
        if self.export_config is None:
            raise ConfigError(
                "there is nowhere to export to",
                where="export_config",
                hint="give Quantizer an ExportConfig(path=...)",
            )
        kind = kind_of(Path(model_dir))
        source = open_checkpoint(f"{kind}:{model_dir}", where="model_dir")
        written = self.export_config.export_format
        describe = None
        if written == "nemo":
            check_nemo_opens_quantizers()
            describe = None if trainer is None else describe_with_nemo(trainer)
        megatron = unwrap_model(model)
        context = ParallelContext.from_megatron(device=next(megatron.parameters()).device)
        with collective_directory(self.export_config.path, context) as directory:
            write_export(
                written,
                directory,
                megatron,
                source.architecture,
                context,
                dtype=getattr(torch, self.export_config.torch_dtype),
                companions=source.companion_files(),
                describe=describe,
            )
        return self.export_config.path

    def _attach(self, model: Any, scheme: Scheme) -> Algorithm:
        """Puts uncalibrated quantizers into a bare model; returns what calibrates them."""
        import modelopt.torch.quantization as mtq

        weight_expert_outputs(model)
        if scheme.kv_cache is not None:
            register_attention()
        config = scheme.modelopt_config(
            layer_offset=layer_offset(model),
            num_layers=len(model.decoder.layers),
            experts=expert_range(model),
        )
        with quiet_modelopt(), shared_experts(expert_modules(model)):
            mtq.quantize(model, to_modelopt(config.with_algorithm(None)))
        if scheme.kv_cache is not None:
            check_kv_quantizers(model)
        return config.algorithm

    def _scheme(self, model: nn.Module, context: ParallelContext) -> Scheme:
        architecture = architecture_of(model)
        refuse_hybrid(architecture, "model")
        return quantization_scheme(
            self.quantization_config,
            architecture,
            tensor_parallel_size=context.tp_size,
        )

    def _finish(self, model: nn.Module, context: ParallelContext, scheme: Scheme) -> None:
        """Checks the scales of a calibrated model and describes what became of its layers."""
        mended = {}
        for item in (*check_scales(model).mended, *floor_input_scales(model)):
            name = global_name(model, item.quantizer)
            mended[name, item.reason] = replace(item, quantizer=name)
        self.mended = [*self._idle_experts(scheme), *context.joined(mended).values()]
        raise_kv_scales(model)
        self.layers = summarize(model, context, scheme.reasons)

    def _idle_experts(self, scheme: Scheme) -> Iterator[MendedScale]:
        """The input scales of the experts that no token reached."""
        config = self.quantization_config
        if config.calibrate_all_experts:
            return
        warn_of_short_experts(self.experts, config.min_expert_tokens)
        idle = {(layer.layer, expert) for layer in self.experts for expert in layer.below(1)}
        for name, settings in scheme.settings.items():
            layer = scheme.layers[name]
            if (layer.layer, layer.expert) in idle and settings.needs_calibration:
                yield MendedScale(
                    quantizer=f"{name}.input_quantizer",
                    elements=1,
                    reason="no token reached the expert: it takes what the layer's others saw",
                )

    def _calibrate(
        self, model: nn.Module, algorithm: Algorithm, forward_loop: ForwardLoop | None
    ) -> None:
        import modelopt.torch.quantization as mtq

        settings = dict(algorithm) if isinstance(algorithm, Mapping) else {"method": algorithm}
        try:
            with functions_put_back():
                if settings.pop("method") == "awq_lite" and forward_loop is not None:
                    awq_calibrate(model, forward_loop, **settings)
                else:
                    loop = None if forward_loop is None else collecting_maxima(forward_loop)
                    mtq.calibrate(model, algorithm, loop)
        except (RuntimeError, ValueError, AssertionError, StopIteration) as error:
            raise CalibrationError(
                f"the calibration failed: {type(error).__name__}: {error}",
                where=f"algorithm {self.quantization_config.algorithm}",
                hint="the model carries half-calibrated quantizers now: load it again",
            ) from error

    def _default_forward_loop(self, model: Any, context: ParallelContext) -> ForwardLoop:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(
                "the recipe needs text to run through the model, and the model has no tokenizer",
                where="forward_loop",
                found=None,
                hint="pass forward_loop=slimtron_quant.calibration_loop(batches, context), or a "
                "model with a `tokenizer`",
            )
        config = self.quantization_config
        data = DataConfig(
            source=config.calibration_source,
            num_tokens=config.calibration_dataset_size * config.calibration_seq_len,
            seq_length=config.calibration_seq_len,
            micro_batch_size=config.calibration_batch_size,
            text_field=config.calibration_text_field,
        )
        # NeMo wraps the tokenizer of transformers in its own.
        dataset = token_dataset(data, getattr(tokenizer, "tokenizer", tokenizer))
        batches = dataset.batches(data.micro_batch_size, context.dp_rank, context.dp_size)
        return calibration_loop(batches, context)


def calibration_loop(batches: Sequence[torch.Tensor], context: ParallelContext) -> ForwardLoop:
    """Makes a forward loop of token batches, at any pipeline size.

    Args:
        batches: This data-parallel rank's token ids, each ``[b, s]``.
        context: This process's place.
    """

    def loop(model: Any) -> None:
        with Progress("calibrate", len(batches)) as progress:
            forward_only(model, batches, context, lambda index, logits: progress.advance())

    return loop
