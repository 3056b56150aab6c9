"""The scale search on a model that carries ModelOpt's quantizers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.errors import ConfigError, UnsupportedModelError
from slimtron_common.progress import Progress
from slimtron_quant.awq.result import AWQResult, LayerScale
from slimtron_quant.awq.search import (
    Correlations,
    InputStatistics,
    candidate_scales,
    weight_magnitude,
)
from slimtron_quant.awq.shard import Shard, all_reduce
from slimtron_quant.calibration.maxima import collecting_maxima
from slimtron_quant.errors import CalibrationError

__all__ = ["awq_calibrate"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def awq_calibrate(
    model: nn.Module,
    forward_loop: Callable[[Any], None],
    *,
    alpha_step: float = 0.1,
    skip: Sequence[str] = (),
) -> AWQResult:
    """Scales the weights of every quantized linear layer so that its output changes least.

    Leaves the model as ModelOpt's ``awq_lite`` does: weights multiplied by the scale, its
    inverse in ``input_quantizer.pre_quant_scale``, all quantizers calibrated. It differs in
    that

    - the text runs through the original model once; ModelOpt runs it twice, the second time
      with every layer computed once more for each candidate;
    - the choice depends on the text alone, neither on how it is cut into batches nor on the
      tensor-, data-, context- and pipeline-parallel layout, apart from rounding. ModelOpt's
      losses and, for row-parallel layers, its scales are those of one process;
    - an unscaled weight is a candidate too, so that no layer gets worse by its scale, and one
      that saw no token (an idle expert) keeps its weights;
    - the loss is that of the weights that will run: all quantizers of a sequence take part, and
      the scale is rounded to the weight's dtype before the weight is multiplied by its inverse.

    Every layer needs ``4 * in * in / tp`` bytes for its input's statistics until its search is
    done: 67 MB at 4096 input channels, 822 MB at 14336. Products of fp32 weights follow torch's
    ``float32_matmul_precision`` (full by default).

    Args:
        model: Converted by ``mtq.quantize`` with the algorithm None, in place.
        forward_loop: Runs this data-parallel rank's text through the model that it is given.
        alpha_step: Distance of the candidate exponents in ``[0, 1]``.
        skip: Patterns of layers to calibrate only, such as those of another format.

    Returns:
        What was chosen, for reports.

    Raises:
        ConfigError: ``alpha_step`` is outside ``(0, 1]``.
        UnsupportedModelError: A layer's weights or quantizers are of a kind that the search
            does not know; nothing was changed.
        CalibrationError: A weight, an input or a loss is not finite, or the model was scaled
            before.
    """
    if not 0 < alpha_step <= 1:
        raise ConfigError(
            "the step between exponents must lie in (0, 1]", where="alpha_step", found=alpha_step
        )
    from modelopt.torch.quantization.model_calib import max_calibrate

    steps = math.floor(1 / alpha_step + 1e-6)
    # In the order of preference among equals.
    alphas = (None, *(round(step * alpha_step, 6) for step in range(steps + 1)))
    was_training = model.training
    model.eval()
    try:
        layers = [_Layer(name, module) for name, module in _quantized_linears(model, skip)]
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.observed())
            # Quantizers are off in this pass. It calibrates those beside AWQ's, too.
            max_calibrate(model, collecting_maxima(forward_loop))
        chosen = {}
        with Progress("searching AWQ scales", len(layers)) as progress:
            while layers:
                layer = layers.pop(0)
                chosen[layer.name] = layer.choose(alphas)
                progress.advance()
    finally:
        model.train(was_training)
    if idle := [name for name, scale in chosen.items() if not scale.num_tokens]:
        logger.warning("no calibration token reached %s: left unscaled", ", ".join(idle))
    return AWQResult(alphas=alphas, layers=chosen)


def _quantized_linears(model: nn.Module, skip: Sequence[str]) -> Iterator[tuple[str, Any]]:
    from modelopt.torch.quantization.utils import is_quantized_linear

    for name, module in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        if is_quantized_linear(module) and module.weight_quantizer.is_enabled:
            yield name, module


class _Layer:
    """One linear layer between the calibration pass and its choice of scale."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        weight = getattr(module, "weight", None)
        inputs = module.input_quantizer
        if weight is None:
            raise UnsupportedModelError(
                "AWQ needs one weight matrix a layer", where=name, found="grouped experts"
            )
        self.calibrates_inputs = inputs.is_enabled and not inputs._dynamic
        blocks = inputs.block_sizes or {"type": "dynamic"}
        if self.calibrates_inputs and (
            inputs.axis not in (None, -1) or blocks.get("type") != "dynamic"
        ):
            raise UnsupportedModelError(
                "AWQ needs calibrated inputs to share one scale",
                where=f"{name}.input_quantizer",
                found=f"axis {inputs.axis}, block_sizes {inputs.block_sizes}",
            )
        if inputs.pre_quant_scale is not None:
            raise CalibrationError(
                "the layer's weights are already scaled", where=name, hint="load the model again"
            )
        _check_finite(weight, name, "weights")
        state = module.parallel_state
        self.data_group = _group(state.data_parallel_group)
        is_row = getattr(module, "_is_row_parallel", False)
        self.shard = Shard(1 if is_row else 0, _group(state.tensor_parallel_group))
        in_features = weight.shape[1] * (self.shard.size if is_row else 1)
        self.statistics = InputStatistics(in_features, self.shard, weight.device)
        self.input_amax: Tensor | None = None

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Collects statistics of what the layer's GEMM reads, while entered."""
        inputs = self.module.input_quantizer
        if self.calibrates_inputs:
            inputs.axis = -1
        hook = inputs.register_forward_pre_hook(lambda _, arguments: self._observe(arguments[0]))
        try:
            yield
            if self.calibrates_inputs and inputs.amax is not None:
                self.input_amax = inputs.amax
                inputs.reset_amax()
        finally:
            hook.remove()
            if self.calibrates_inputs:
                inputs.axis = None

    def _observe(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        if not len(x):
            return
        if self.shard.dim == 1:
            x = self.shard.gather(x, 1)
        elif _reads_sequence_shard(self.module):
            x = self.shard.gather(x, 0)
        self.statistics.update(x)

    def choose(self, alphas: Sequence[float | None]) -> LayerScale:
        """Tries the candidates, leaves the layer with the best and forgets the statistics."""
        statistics, original = self.statistics, self.module.weight.detach().clone()
        statistics.reduce(self.data_group)
        _check_finite(statistics.magnitude, self.name, "inputs")
        scales = [
            (1 / self._local(scale)).to(original.dtype)
            for scale in candidate_scales(
                statistics.mean_magnitude,
                weight_magnitude(original, self._block_size(), self.shard),
                alphas,
            )
        ]
        # A weight in a half type has rounded away more than bfloat16 correlations do.
        half = original.is_cuda and original.dtype in (torch.bfloat16, torch.float16)
        correlations = statistics.correlations(torch.bfloat16 if half else torch.float32)
        signal = original * correlations.local_norms
        noise = [self._noise(original, scale, signal, correlations) for scale in scales]
        energies = torch.stack([correlations.energy(signal), *noise])
        energies = all_reduce(energies, self.shard.group)
        # Equal on data-parallel processes already, unless a kernel's order of additions varies.
        energies = all_reduce(energies, self.data_group)
        energies /= 1 if self.data_group is None else dist.get_world_size(self.data_group)
        _check_finite(energies, self.name, "output errors")
        power, *losses = (energies / max(statistics.num_tokens, 1)).tolist()
        best = min(range(len(losses)), key=losses.__getitem__)
        self._apply(original, scales[best])
        return LayerScale(
            alpha=alphas[best],
            losses=tuple(losses),
            signal=power,
            num_tokens=statistics.num_tokens,
        )

    def _local(self, scale: Tensor) -> Tensor:
        return scale[self.statistics.rows] if self.shard.dim == 1 else scale

    def _block_size(self) -> int | None:
        blocks = next(_leaves(self.module.weight_quantizer)).block_sizes or {}
        size: int | None = blocks.get(-1) or blocks.get(1)
        return size

    def _noise(
        self, original: Tensor, pre_quant_scale: Tensor, signal: Tensor, correlations: Correlations
    ) -> Tensor:
        module = self.module
        self._scale_weight(original, pre_quant_scale)
        quantized = module.weight_quantizer(module.weight)
        scaled = quantized * (pre_quant_scale.float() * correlations.local_norms)
        return correlations.energy(scaled.sub_(signal))

    def _scale_weight(self, original: Tensor, pre_quant_scale: Tensor) -> None:
        """Sets the weight to its scaled self and calibrates its quantizers on that."""
        module = self.module
        torch.div(original, pre_quant_scale.float(), out=module.weight)
        leaves = list(_leaves(module.weight_quantizer))
        for quantizer in leaves:
            quantizer.reset_amax()
            quantizer.disable_quant()
            quantizer.enable_calib()
        module.weight_quantizer(module.weight)
        for quantizer in leaves:
            quantizer.load_calib_amax()
            quantizer.enable_quant()
            quantizer.disable_calib()
        for quantizer in leaves:
            over_output_channels = quantizer.block_sizes is None and quantizer.axis in (0, (0,))
            if quantizer.axis is None or (self.shard.dim == 1 and over_output_channels):
                quantizer.sync_amax_across_distributed_group(
                    module.parallel_state.tensor_parallel_group
                )

    def _apply(self, original: Tensor, pre_quant_scale: Tensor) -> None:
        self._scale_weight(original, pre_quant_scale)
        inputs = self.module.input_quantizer
        inputs._enable_pre_quant_scale = True
        inputs.pre_quant_scale = pre_quant_scale
        if self.input_amax is not None:
            # ModelOpt reads it where it undoes a scale, and expects it on the CPU.
            inputs._amax_for_smoothing = self.input_amax.cpu()
            amax = (self.input_amax.float() * pre_quant_scale.float()).amax()
            inputs.amax = all_reduce(amax, self.shard.group, dist.ReduceOp.MAX).to(original.dtype)


def _reads_sequence_shard(module: Any) -> bool:
    """Tells whether a column-parallel layer's quantizer sees this process's tokens alone.

    Under sequence parallelism the GEMM gathers the others' behind the quantizer, except in
    Transformer Engine's layer fused with a norm, which gathers before it.
    """
    return (
        getattr(module, "sequence_parallel", False)
        and not getattr(module, "explicit_expert_comm", False)
        and not hasattr(module, "layer_norm_weight")
    )


def _leaves(quantizer: Any) -> Iterator[Any]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return (leaf for leaf in quantizer.modules() if isinstance(leaf, TensorQuantizer))


def _group(wrapped: Any) -> dist.ProcessGroup | None:
    if not wrapped.is_initialized() or wrapped.world_size() == 1:
        return None
    group: dist.ProcessGroup | None = wrapped.group
    # ModelOpt's None is the group of all processes.
    return group or dist.group.WORLD


def _check_finite(values: Tensor, name: str, what: str) -> None:
    if not values.isfinite().all():
        raise CalibrationError(
            f"the {what} hold NaN or infinity",
            where=name,
            hint="check the weights, and the dtype's range: load the model in bfloat16 or float32",
        )
