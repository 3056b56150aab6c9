"""Whether what a scheme computes can be written, found out before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from slimtron_common.errors import ConfigError, UnsupportedModelError
from slimtron_common.integrations.modelopt import make_quantizer
from slimtron_common.models.architecture import Architecture
from slimtron_quant.formats import format_named
from slimtron_quant.formats.alignment import unfit_layers
from slimtron_quant.formats.detect import LayerFormat, detect_format
from slimtron_quant.recipes.scheme import Scheme
from slimtron_quant.recipes.settings import LinearSettings

__all__ = ["formats_on_disk"]


def formats_on_disk(
    scheme: Scheme, architecture: Architecture, *, tensor_parallel_size: int = 1
) -> Mapping[str, LayerFormat]:
    """Returns the format of every layer that is quantized, by its name in the whole model.

    Args:
        scheme: What becomes of each layer.
        architecture: The whole model.
        tensor_parallel_size: Processes that share a layer.

    Raises:
        ConfigError: A recipe makes quantizers that no format holds, or blocks that do not divide
            a layer.
    """
    if scheme.method == "svdquant":
        raise ConfigError(
            "no format on disk holds the low-rank part of SVDQuant",
            where="algorithm",
            found=scheme.recipe.name,
        )
    known: list[tuple[LinearSettings, LayerFormat]] = []
    formats: dict[str, LayerFormat] = {}
    for module, settings in scheme.settings.items():
        found = next((fmt for other, fmt in known if other == settings), None)
        if found is None:
            found = _format(settings, scheme, module)
            known.append((settings, found))
        formats[module] = found
    for _, fmt in known:
        unfit = unfit_layers(
            format_named(fmt.name),
            architecture,
            block_size=fmt.block_size,
            tensor_parallel_size=tensor_parallel_size,
        )
        if misfits := [m for m in unfit if formats.get(m) == fmt]:
            reasons = {f"{scheme.layers[m].kind}: {unfit[m]}" for m in misfits}
            raise ConfigError(
                "the blocks do not divide some of the layers",
                where=scheme.setting_of(misfits[0]),
                found=f"{scheme.choices[misfits[0]].recipe}: {'; '.join(sorted(reasons))}",
                hint="exclude these layers, use fewer tensor-parallel processes, or take fp8",
            )
    return formats


def _format(settings: LinearSettings, scheme: Scheme, module: str) -> LayerFormat:
    linear = SimpleNamespace(
        weight_quantizer=make_quantizer(settings.weight),
        input_quantizer=make_quantizer(settings.inputs),
    )
    try:
        found = detect_format(linear)
    except UnsupportedModelError as error:
        raise ConfigError(
            "no format on disk holds what this recipe computes",
            where=scheme.setting_of(module),
            found=f"{scheme.choices[module].recipe}: {error.found}",
            allowed=error.allowed,
        ) from error
    assert found is not None, "a layer with settings has an enabled weight quantizer"
    return found
