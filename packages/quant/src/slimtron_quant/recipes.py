"""The quantization recipes, and how one becomes a ModelOpt config for a given model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import QuantConfig, QuantizerEntry, named_config
from slimtron_common.models.architecture import Architecture

if TYPE_CHECKING:
    from slimtron_quant.config import QuantizationConfig

__all__ = [
    "RECIPES",
    "Recipe",
    "excluded_modules",
    "quantizable_modules",
    "quantization_recipe",
    "recipe_named",
    "resolve_block_size",
]

BLOCK_SIZES = (128, 64, 32, 16)
"""What ``auto`` tries, the coarsest first: fewer scales, fewer bits per weight. The INT4 kernels
of the inference engines know none above 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to quantize the linear layers of a model."""

    name: str
    summary: str
    hardware: str
    """GPUs that compute in this format."""

    engines: str
    """Inference engines that load the exported checkpoint."""

    accuracy: str
    modelopt_config: str
    """ModelOpt's config that it starts from."""

    weight_bits: int
    activation_bits: int
    needs_calibration: bool
    """Whether text has to run through the model."""

    has_blocks: bool = False
    """Whether ``awq_block_size`` applies."""


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="fp8",
                summary="8-bit floats (E4M3), one scale for a tensor, weights and activations",
                hardware="compute capability 8.9 and newer: Ada, Hopper, Blackwell",
                engines="vLLM, SGLang, TensorRT-LLM",
                accuracy="closest to the original of these recipes",
                modelopt_config="FP8_DEFAULT_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=True,
            ),
            Recipe(
                name="int8",
                summary="8-bit integers, one scale for an output channel and for the activations",
                hardware="compute capability 7.2 and newer: Turing, Ampere and later",
                engines="none yet of vLLM, SGLang and TensorRT-LLM (PyTorch backend)",
                accuracy="poor where a few activation channels are far larger than the rest",
                modelopt_config="INT8_DEFAULT_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=True,
            ),
            Recipe(
                name="int8_sq",
                summary="int8 after SmoothQuant moved activation outliers into the weights",
                hardware="compute capability 7.2 and newer: Turing, Ampere and later",
                engines="none yet of vLLM, SGLang and TensorRT-LLM (PyTorch backend)",
                accuracy="much better than int8 on language models; sq_alpha tunes it",
                modelopt_config="INT8_SMOOTHQUANT_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=True,
            ),
            Recipe(
                name="int4",
                summary="4-bit integer weights in blocks, activations as they are",
                hardware="compute capability 8.0 and newer: Ampere and later",
                engines="TensorRT-LLM (blocks of 64 and 128)",
                accuracy="a visible loss; needs no calibration text",
                modelopt_config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
                weight_bits=4,
                activation_bits=16,
                needs_calibration=False,
                has_blocks=True,
            ),
            Recipe(
                name="int4_awq",
                summary="int4 after AWQ scaled up the input channels that matter most",
                hardware="compute capability 8.0 and newer: Ampere and later",
                engines="TensorRT-LLM (blocks of 64 and 128)",
                accuracy="better than int4; its calibration takes a few times that of fp8",
                modelopt_config="INT4_AWQ_CFG",
                weight_bits=4,
                activation_bits=16,
                needs_calibration=True,
                has_blocks=True,
            ),
        )
    }
)


def recipe_named(name: str) -> Recipe:
    """Returns a recipe.

    Raises:
        ConfigError: There is none of this name.
    """
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1)
    raise ConfigError(
        "no such recipe",
        where="algorithm",
        found=name,
        allowed=", ".join(RECIPES),
        hint=f"did you mean {close[0]}?" if close else None,
    )


def quantization_recipe(
    config: QuantizationConfig,
    architecture: Architecture,
    *,
    tensor_parallel_size: int = 1,
    layer_offset: int = 0,
) -> QuantConfig:
    """Returns the ModelOpt config that quantizes this process's part of a model.

    Embedding and output layer stay as they are.

    Args:
        config: Recipe, its settings, and the modules to leave out.
        architecture: The whole model.
        tensor_parallel_size: Processes that share a layer: each holds a part of the input
            channels of the row-parallel ones.
        layer_offset: Layers before this process's first: Megatron-Core numbers the layers of
            each pipeline stage from 0.

    Raises:
        ConfigError: The block size does not divide an input dimension, a pattern of
            ``exclude`` matches nothing, or nothing is left to quantize.
        MissingDependencyError: ModelOpt is absent, or too old for the recipe.
    """
    if config.algorithm is None:
        raise ConfigError("no recipe to quantize with", where="algorithm", found=None)
    recipe = recipe_named(config.algorithm)
    excluded = excluded_modules(config.exclude, architecture)
    if excluded == quantizable_modules(architecture):
        raise ConfigError(
            "every layer is excluded: nothing is quantized", where="exclude", found=config.exclude
        )
    quant_config = named_config(recipe.modelopt_config).with_entries(
        *_disabled(["output_layer", "embedding", *_local(excluded, layer_offset)])
    )
    if recipe.name == "int8_sq":
        quant_config = quant_config.with_algorithm(
            {"method": "smoothquant", "alpha": config.sq_alpha}
        )
    block_size = resolve_block_size(config, architecture, tensor_parallel_size=tensor_parallel_size)
    return quant_config if block_size is None else quant_config.with_block_size(block_size)


def resolve_block_size(
    config: QuantizationConfig, architecture: Architecture, *, tensor_parallel_size: int = 1
) -> int | None:
    """Returns the input channels that share a weight scale; None for recipes without blocks.

    Raises:
        ConfigError: The size asked for does not divide the input dimension of some quantized
            layer, or with ``auto`` no size does.
    """
    if config.algorithm is None or not recipe_named(config.algorithm).has_blocks:
        return None
    excluded = set(excluded_modules(config.exclude, architecture))
    quantized = [name for name in quantizable_modules(architecture) if name not in excluded]
    dimensions = {
        layer: size
        for layer, size in _input_dimensions(architecture, tensor_parallel_size).items()
        if any(name.endswith(layer) for name in quantized)
    }
    fitting = [size for size in BLOCK_SIZES if not any(dim % size for dim in dimensions.values())]
    if config.awq_block_size == "auto":
        if fitting:
            return fitting[0]
        misfits = {layer: dim for layer, dim in dimensions.items() if dim % BLOCK_SIZES[-1]}
    else:
        misfits = {layer: dim for layer, dim in dimensions.items() if dim % config.awq_block_size}
        if not misfits:
            return config.awq_block_size
    where = f" of each of {tensor_parallel_size} processes" if tensor_parallel_size > 1 else ""
    raise ConfigError(
        f"the block size must divide the input channels{where}: "
        + ", ".join(f"{layer} has {dim}" for layer, dim in misfits.items()),
        where="awq_block_size",
        found=config.awq_block_size,
        allowed=", ".join(map(str, fitting)) or "no size fits this model",
        hint=(
            "use auto for the largest that fits"
            if fitting
            else "exclude these layers, use fewer tensor-parallel processes, or take fp8"
        ),
    )


def quantizable_modules(architecture: Architecture) -> list[str]:
    """Returns the Megatron-Core names of the layers a recipe quantizes, counted over all stages."""
    return [
        f"decoder.layers.{layer}.{name}"
        for layer in range(architecture.num_layers)
        for name in _input_dimensions(architecture, 1)
    ]


def excluded_modules(patterns: tuple[str, ...], architecture: Architecture) -> list[str]:
    """Returns the quantizable modules that ``patterns`` match, themselves or by a parent.

    Raises:
        ConfigError: A pattern matches none.
    """
    modules = quantizable_modules(architecture)
    matches = {
        pattern: [m for m in modules if fnmatchcase(m, pattern) or fnmatchcase(m, f"{pattern}.*")]
        for pattern in patterns
    }
    for pattern, matched in matches.items():
        if not matched:
            close = difflib.get_close_matches(pattern, modules, n=1, cutoff=0)
            raise ConfigError(
                "the pattern matches no quantized module",
                where="exclude",
                found=pattern,
                allowed=f"module names such as {close[0]}, * for any characters",
            )
    chosen = {module for matched in matches.values() for module in matched}
    return [module for module in modules if module in chosen]


def _input_dimensions(architecture: Architecture, tensor_parallel_size: int) -> dict[str, int]:
    """Input channels that one process holds of each quantized layer."""
    return {
        "self_attention.linear_qkv": architecture.hidden_size,
        "self_attention.linear_proj": architecture.query_size // tensor_parallel_size,
        "mlp.linear_fc1": architecture.hidden_size,
        "mlp.linear_fc2": architecture.ffn_hidden_size // tensor_parallel_size,
    }


def _local(modules: list[str], layer_offset: int) -> Iterator[str]:
    """Names that this process's modules have: those of earlier stages are left out."""
    for module in modules:
        decoder, layers, layer, name = module.split(".", 3)
        if int(layer) >= layer_offset:
            yield f"{decoder}.{layers}.{int(layer) - layer_offset}.{name}"


def _disabled(modules: list[str]) -> Iterator[QuantizerEntry]:
    # The model may sit inside another module: its names need not begin with "decoder".
    return (QuantizerEntry(f"*{module}.*", enable=False) for module in modules)
