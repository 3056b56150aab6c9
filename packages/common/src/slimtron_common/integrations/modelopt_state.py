"""ModelOpt's quantizers in a Megatron distributed checkpoint.

The convention is ModelOpt's for Megatron-LM, so that its ``restore_sharded_modelopt_state`` finds
all of it: the folder ``modelopt_state`` inside the checkpoint says that the model is quantized,
each layer's quantizers say how in the layer's extra state, and their scales are sharded tensors.

Two things differ from what ModelOpt 0.47 does by itself. The scales of a gated MLP's output
channels are cut as their weight is, gate and up apart: ModelOpt means to and matches no name, so
that a checkpoint opened at another tensor-parallel size gets another half's scales. And the
quantizers of a layer are built from its extra state alone, because the patterns in
``modelopt_state`` count the layers of the pipeline stage that wrote them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from slimtron_common.errors import CheckpointError, MissingDependencyError
from slimtron_common.integrations.megatron_core import COMMON_STATE, load_sharded, save_common_state

__all__ = [
    "STATE_DIR",
    "cut_gated_scales",
    "is_quantized",
    "quantizer_settings",
    "quiet_modelopt",
    "restore_quantizers",
    "write_modelopt_state",
]

logger = logging.getLogger(__name__)

STATE_DIR = "modelopt_state"

_EXTRA = "_extra_state"
_ZIP = b"PK"
_SECOND_GENERATION = Version("0.44")


def is_quantized(model: nn.Module) -> bool:
    """Tells whether a model carries ModelOpt's quantizers."""
    return hasattr(model, "_modelopt_state")


def quantizer_settings(model: Any) -> dict[str, Any]:
    """Returns the sharded objects that hold what each layer's quantizers are.

    Args:
        model: The bare model, with quantizers.
    """
    layers = {
        f"{name}.{_EXTRA}"
        for name, module in model.named_modules()
        if hasattr(module, "modelopt_get_extra_state_callbacks")
    }
    with quiet_modelopt():
        sharded = model.sharded_state_dict(prefix="")
    return {name: value for name, value in sharded.items() if name in layers}


def cut_gated_scales(model: Any, sharded: dict[str, Any]) -> dict[str, Any]:
    """Returns sharded tensors in which a gated MLP's scales are cut as its weight is.

    Args:
        model: The bare model, with quantizers.
        sharded: Of its ``sharded_state_dict``.
    """
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    if not model.config.gated_linear_unit:
        return sharded
    found = dict(sharded)
    for name, tensor in sharded.items():
        layer, _, quantizer = name.partition(".weight_quantizer.")
        if not layer.endswith("linear_fc1") or not quantizer:
            continue
        if not hasattr(tensor, "local_shape"):
            # Cut by ModelOpt already.
            continue
        shape = tensor.local_shape
        # Rows of scales that lie in gate and up each. A block across both cannot be cut.
        rows = model.get_submodule(layer).weight.shape[0]
        if tensor.data.numel() > 1 and shape[0] % 2 == 0 and rows % shape[0] == 0:
            outer = range(tensor.prepend_axis_num)
            offsets = [(i, tensor.global_offset[i], tensor.axis_fragmentations[i]) for i in outer]
            found[name] = apply_swiglu_sharded_factory(tensor, offsets)
    return found


def write_modelopt_state(model: nn.Module, weights: Path) -> None:
    """Writes the folder that announces the quantizers; one process calls it.

    Args:
        model: The bare model, with quantizers.
        weights: The distributed checkpoint.
    """
    import modelopt.torch.opt as mto
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state

    state = copy.deepcopy(mto.modelopt_state(model))
    remove_per_module_state(state)
    save_common_state(state, weights / STATE_DIR)


def restore_quantizers(model: nn.Module, weights: Path, prefix: str = "") -> None:
    """Gives a bare model the quantizers of a checkpoint, their scales not loaded yet.

    Args:
        model: A new model in any layout; its weights are overwritten.
        weights: The distributed checkpoint.
        prefix: What its names start with.

    Raises:
        MissingDependencyError: ModelOpt is absent.
        CheckpointError: The installed ModelOpt does not take the state, or it is incomplete.
    """
    try:
        import modelopt.torch.opt as mto
        import modelopt.torch.quantization  # noqa: F401 - registers the modes
    except ModuleNotFoundError as error:
        if error.name != "modelopt":
            raise
        raise MissingDependencyError(
            "the checkpoint is quantized: NVIDIA ModelOpt computes its quantizers",
            where=weights,
            hint="pip install nvidia-modelopt",
        ) from error
    state = torch.load(weights / STATE_DIR / COMMON_STATE, map_location="cpu", weights_only=True)
    _check_generation(state, weights)
    with torch.no_grad():
        for parameter in model.parameters():
            # ModelOpt takes the scales' shapes from a calibration, which NaN would stop.
            parameter.fill_(1.0)
    try:
        with quiet_modelopt():
            mto.restore_from_modelopt_state(model, state)
            settings_of = load_sharded(quantizer_settings(model), weights, prefix)
            for name, settings in settings_of.items():
                _restore_layer(model.get_submodule(name.removesuffix(f".{_EXTRA}")), settings)
    # ModelOpt asserts and looks keys up in what it reads.
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the installed ModelOpt does not restore the quantizers: "
            f"{type(error).__name__}: {error}",
            where=weights / STATE_DIR,
            found=f"written by nvidia-modelopt {state.get('modelopt_version')}",
        ) from error


def _check_generation(state: dict[str, Any], weights: Path) -> None:
    """Refuses what only ModelOpt of the other generation opens: both name tensors their own way."""
    import modelopt

    written, installed = (Version(v) for v in (state["modelopt_version"], modelopt.__version__))
    if (written < _SECOND_GENERATION) != (installed < _SECOND_GENERATION):
        raise CheckpointError(
            "the quantizers are of another generation of ModelOpt than the installed one",
            where=weights / STATE_DIR,
            found=f"written by nvidia-modelopt {written}, opened with {installed}",
            allowed="both before 0.44, as NeMo 2's, or both from it on",
            hint="`slimtron-quant export` writes it for inference engines where its ModelOpt is",
        )


@contextlib.contextmanager
def quiet_modelopt() -> Iterator[None]:
    """Turns what ModelOpt prints into debug messages: standard output is for results."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("modelopt: %s", line)


def _restore_layer(layer: Any, settings: torch.Tensor | None) -> None:
    if settings is None:
        return
    state = _decoded(settings.numpy(force=True).tobytes())
    quantizers = state.get("modelopt_quantizer_state", {})
    _match_structure(layer, quantizers)
    # What ModelOpt does with it once it is decoded; ModelOpt of NeMo 2 decodes any pickle.
    for restore in layer.modelopt_set_extra_state_callbacks:
        restore(layer, state)
    for name, state in quantizers.items():
        quantizer = layer.get_submodule(name)
        for buffer, saved in state["_pytorch_state_metadata"]["buffers"].items():
            # Calibrated again, they have the type of this model's weights.
            quantizer._buffers[buffer] = quantizer._buffers[buffer].to(saved["dtype"])


def _load_storage(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), weights_only=True)


_PICKLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    # torch's own would run what it finds.
    ("torch.storage", "_load_from_bytes"): _load_storage,
    # What Megatron-Core 0.19 puts in its place.
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _load_storage,
}


class _SettingsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PICKLED:
            return _PICKLED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place among quantizers")


def _decoded(raw: bytes) -> dict[str, Any]:
    """Reads the settings of a layer as ModelOpt's versions write them: zipped, or a bare pickle."""
    file = io.BytesIO(raw)
    found: dict[str, Any] = (
        torch.load(file, weights_only=True)
        if raw.startswith(_ZIP)
        else _SettingsUnpickler(file).load()
    )
    return found


def _match_structure(layer: Any, quantizers: dict[str, Any]) -> None:
    """Gives a layer as many quantizers in sequence as were saved."""
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    for kind in {name.partition(".")[0] for name in quantizers}:
        count = sum(name.startswith(f"{kind}.") for name in quantizers)
        if count and not isinstance(getattr(layer, kind), SequentialQuantizer):
            setattr(layer, kind, SequentialQuantizer(*(TensorQuantizer() for _ in range(count))))
        elif not count and isinstance(getattr(layer, kind), SequentialQuantizer):
            setattr(layer, kind, TensorQuantizer())
