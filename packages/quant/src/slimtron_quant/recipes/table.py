"""The recipes that have a name of their own. Light to import."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from slimtron_common.errors import ConfigError

__all__ = [
    "MODELOPT_PREFIX",
    "NO_RECIPE",
    "RECIPES",
    "Recipe",
    "check_recipe_name",
    "is_file",
    "recipe_named",
]

MODELOPT_PREFIX = "modelopt:"
"""Before the name of one of the installed ModelOpt's own configs."""

_FILE_SUFFIXES = (".yaml", ".yml", ".json")

_FP8_GPUS = "Ada, Hopper, Blackwell (compute capability 8.9 and newer)"
_INT8_GPUS = "Turing, Ampere and later (compute capability 7.2 and newer)"
_AMPERE = "Ampere and later (compute capability 8.0 and newer)"
_BLACKWELL = "Blackwell (compute capability 10.0 and newer)"
_NO_ENGINE = "none yet of vLLM, SGLang and TensorRT-LLM"


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
    modelopt_config: str | None
    """ModelOpt's config that it starts from; None for one that a file holds."""

    weight_bits: int
    activation_bits: int
    block_size: int | None = None
    """Input channels that share a weight scale; None where a whole channel or tensor does."""

    has_blocks: bool = False
    """Whether ``awq_block_size`` may change ``block_size``."""

    needs_calibration: bool
    """Whether text has to run through the model."""

    rewrites_weights: bool = False
    """Whether its algorithm moves factors between inputs and weights, and so takes all layers."""

    needs_cuda: bool = False
    """Whether ModelOpt computes it on a GPU only."""

    kv_cache: str | None = None
    """Format of the KV cache, for one that quantizes it too."""


NO_RECIPE = Recipe(
    name="none",
    summary="weights and activations as they are",
    hardware="all",
    engines="all",
    accuracy="that of the original",
    modelopt_config=None,
    weight_bits=16,
    activation_bits=16,
    needs_calibration=False,
)
"""What the algorithm None stands for."""

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="fp8",
                summary="8-bit floats (E4M3), one scale for a tensor, weights and activations",
                hardware=_FP8_GPUS,
                engines="vLLM, SGLang, TensorRT-LLM",
                accuracy="close to the original, and the best supported of all",
                modelopt_config="FP8_DEFAULT_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=True,
            ),
            Recipe(
                name="fp8_pc_pt",
                summary="8-bit floats, one scale for an output channel and, as it runs, a token",
                hardware=_FP8_GPUS,
                engines="vLLM, TensorRT-LLM",
                accuracy="a little closer than fp8, without calibration text",
                modelopt_config="FP8_PER_CHANNEL_PER_TOKEN_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=False,
            ),
            Recipe(
                name="block_fp8",
                summary="8-bit float weights in blocks of 128 x 128, activations as they are",
                hardware=_FP8_GPUS,
                engines="vLLM, TensorRT-LLM",
                accuracy="the closest of all; an engine that computes in FP8 adds to it",
                modelopt_config="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
                weight_bits=8,
                activation_bits=16,
                block_size=128,
                needs_calibration=False,
            ),
            Recipe(
                name="int8",
                summary="8-bit integers, one scale for an output channel and for the activations",
                hardware=_INT8_GPUS,
                engines=_NO_ENGINE,
                accuracy="poor where a few activation channels dwarf the rest",
                modelopt_config="INT8_DEFAULT_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=True,
            ),
            Recipe(
                name="int8_sq",
                summary="int8 after SmoothQuant moved activation outliers into the weights",
                hardware=_INT8_GPUS,
                engines=_NO_ENGINE,
                accuracy="much better than int8 on language models; sq_alpha tunes it",
                modelopt_config="INT8_SMOOTHQUANT_CFG",
                weight_bits=8,
                activation_bits=8,
                needs_calibration=True,
                rewrites_weights=True,
            ),
            Recipe(
                name="int4",
                summary="4-bit integer weights in blocks, activations as they are",
                hardware=_AMPERE,
                engines="TensorRT-LLM (blocks of 64 and 128)",
                accuracy="a visible loss; needs no calibration text",
                modelopt_config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
                weight_bits=4,
                activation_bits=16,
                block_size=128,
                has_blocks=True,
                needs_calibration=False,
            ),
            Recipe(
                name="int4_awq",
                summary="int4 after AWQ scaled up the input channels that matter most",
                hardware=_AMPERE,
                engines="TensorRT-LLM (blocks of 64 and 128)",
                accuracy="better than int4; its calibration takes a few times that of fp8",
                modelopt_config="INT4_AWQ_CFG",
                weight_bits=4,
                activation_bits=16,
                block_size=128,
                has_blocks=True,
                needs_calibration=True,
                rewrites_weights=True,
            ),
            Recipe(
                name="w4a8_awq",
                summary="int4_awq weights that are rounded to 8-bit floats, activations too",
                hardware=_FP8_GPUS,
                engines="TensorRT-LLM (blocks of 128)",
                accuracy="a little behind int4_awq, for faster products",
                modelopt_config="W4A8_AWQ_BETA_CFG",
                weight_bits=4,
                activation_bits=8,
                block_size=128,
                has_blocks=True,
                needs_calibration=True,
                rewrites_weights=True,
            ),
            Recipe(
                name="nvfp4",
                summary="4-bit floats (E2M1) in blocks of 16, weights and activations",
                hardware=f"{_BLACKWELL}; vLLM keeps activations at 16 bits on older ones",
                engines="vLLM, SGLang, TensorRT-LLM",
                accuracy="a visible loss, less on large models",
                modelopt_config="NVFP4_DEFAULT_CFG",
                weight_bits=4,
                activation_bits=4,
                block_size=16,
                needs_calibration=True,
                needs_cuda=True,
            ),
            Recipe(
                name="nvfp4_awq",
                summary="nvfp4 after AWQ scaled up the input channels that matter most",
                hardware=_BLACKWELL,
                engines="TensorRT-LLM",
                accuracy="better than nvfp4; its calibration takes a few times as long",
                modelopt_config="NVFP4_AWQ_LITE_CFG",
                weight_bits=4,
                activation_bits=4,
                block_size=16,
                needs_calibration=True,
                rewrites_weights=True,
                needs_cuda=True,
            ),
            Recipe(
                name="w4a16_nvfp4",
                summary="4-bit float weights in blocks of 16, activations as they are",
                hardware=_AMPERE,
                engines="vLLM",
                accuracy="better than int4 and nvfp4; needs no calibration text",
                modelopt_config="W4A16_NVFP4_CFG",
                weight_bits=4,
                activation_bits=16,
                block_size=16,
                needs_calibration=False,
                needs_cuda=True,
            ),
            Recipe(
                name="mxfp4",
                summary="4-bit floats in blocks of 32 with a power of two each, activations too",
                hardware=_BLACKWELL,
                engines=_NO_ENGINE,
                accuracy="behind nvfp4: larger blocks, coarser scales",
                modelopt_config="MXFP4_DEFAULT_CFG",
                weight_bits=4,
                activation_bits=4,
                block_size=32,
                needs_calibration=False,
                needs_cuda=True,
            ),
            Recipe(
                name="mxfp8",
                summary="8-bit floats in blocks of 32 with a power of two each, activations too",
                hardware=_BLACKWELL,
                engines="vLLM",
                accuracy="about that of fp8, without calibration text",
                modelopt_config="MXFP8_DEFAULT_CFG",
                weight_bits=8,
                activation_bits=8,
                block_size=32,
                needs_calibration=False,
                needs_cuda=True,
            ),
        )
    }
)


def is_file(name: str) -> bool:
    """Whether a recipe's name is that of a recipe file."""
    return name.endswith(_FILE_SUFFIXES)


def check_recipe_name(name: str, *, where: str = "algorithm") -> None:
    """Refuses what cannot be a recipe, without opening files or importing ModelOpt.

    Raises:
        ConfigError: It is none of Slimtron's and has neither the prefix of ModelOpt's nor the
            suffix of a file.
    """
    if not is_file(name) and not name.startswith(MODELOPT_PREFIX):
        recipe_named(name, where=where)


def recipe_named(name: str, *, where: str = "algorithm") -> Recipe:
    """Returns one of Slimtron's recipes.

    Raises:
        ConfigError: There is none of this name.
    """
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1)
    raise ConfigError(
        "no such recipe",
        where=where,
        found=name,
        allowed=f"{', '.join(RECIPES)}, {MODELOPT_PREFIX}NAME, a .yaml or .json file",
        hint=f"did you mean {close[0]}?" if close else None,
    )
