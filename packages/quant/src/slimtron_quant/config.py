"""What to quantize to, what to calibrate with, and what to write.

Names, order and defaults are those of NeMo 2's ``llm.modelopt``; where a default differs, the
field says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slimtron_common.errors import ConfigError
from slimtron_quant.recipes import check_recipe_name
from slimtron_quant.recipes.kv_cache import KV_CACHE_QFORMATS
from slimtron_quant.recipes.table import is_file

__all__ = ["ExportConfig", "QuantizationConfig"]

_EXPORT_FORMATS = ("hf", "megatron", "nemo", "trtllm")
_DTYPES = {
    "bf16": "bfloat16",
    "16": "float16",
    "fp16": "float16",
    "32": "float32",
    "fp32": "float32",
}
_NEMO_DATASETS = {
    "cnn_dailymail": ("hf:cnn_dailymail,3.0.0:train", "article"),
    "wikitext": ("hf:wikitext,wikitext-103-v1:train", "text"),
}


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How to quantize a model, and the text that calibrates it."""

    algorithm: str | None = "fp8"
    """Recipe: one of ``slimtron-quant recipes``, ``modelopt:NAME`` for one of the installed
    ModelOpt's own configs, or a recipe file (.yaml or .json, NeMo's among them: see
    ``slimtron_quant.recipes.files``). None leaves the weights as they are: for the KV cache
    alone."""

    awq_block_size: int | Literal["auto"] = 128
    """Input channels that share a weight scale in ``int4``, ``int4_awq`` and ``w4a8_awq``. It must
    divide the input dimension of every layer that is quantized so; ``auto`` takes the largest
    that does. NeMo left ``int4`` at 128 and found a misfit at export, after
    calibrating."""

    sq_alpha: float = 0.5
    """SmoothQuant's migration strength, from 0 (all difficulty stays with the activations) to 1
    (all goes to the weights). NeMo ignored it and always ran ModelOpt's 1.0."""

    enable_kv_cache: bool | None = None
    """Whether to quantize the KV cache. None leaves it to the recipe: Slimtron's own do not, a
    ModelOpt config or a file may. NeMo switched it on for most recipes, which made weight-only
    recipes calibrate."""

    kv_cache_qformat: str = "fp8"
    """Format of the KV cache that ``enable_kv_cache`` asks for: fp8 or nvfp4."""

    calibration_dataset: str = "cnn_dailymail"
    """Text to calibrate with: ``pydoc``, a file (.txt, .jsonl, .json, .parquet), or
    ``hf:NAME[,CONFIG][:SPLIT]``. ``cnn_dailymail`` and ``wikitext`` stand for those data sets on
    the Hugging Face hub."""

    calibration_dataset_size: int = 512
    """Sequences to calibrate with. Each is packed full with text; NeMo padded short ones with
    end-of-text tokens, which went into the statistics."""

    calibration_batch_size: int = 64
    """Sequences in a micro-batch."""

    calibration_seq_len: int = 128
    """Tokens in a sequence."""

    exclude: tuple[str, ...] = ()
    """Patterns of Megatron module names to leave unquantized (``*.linear_fc2``,
    ``decoder.layers.0``), layers counted from 0 over the whole model. A pattern also covers
    what lies inside the modules that it matches; one that matches nothing is an error."""

    include: tuple[str, ...] = ()
    """Patterns of the only modules to quantize; none for all."""

    overrides: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    """Another recipe for the modules that a pattern matches, or None to leave them as they are.
    A later pattern wins over an earlier one, ``exclude`` and ``include`` over both. Only
    ``algorithm`` can be a recipe that searches (``int8_sq`` and those with AWQ)."""

    calibrate_all_experts: bool = False
    """Whether the experts of a mixture are calibrated on every token instead of on those that
    their router sends them; what the layers put out stays as routed. It costs the forward passes
    of all experts, and input scales cover tokens that an expert may never see."""

    min_expert_tokens: int = 128
    """Experts with fewer calibration tokens are reported. The next of n tokens exceeds the largest
    of them with a chance of 1 in n + 1: below 1% at 128."""

    def __post_init__(self) -> None:
        if self.algorithm is not None:
            check_recipe_name(self.algorithm)
        if self.awq_block_size != "auto":
            _check_positive("awq_block_size", self.awq_block_size, "a positive integer, or auto")
        for name in ("dataset_size", "batch_size", "seq_len"):
            field = f"calibration_{name}"
            _check_positive(field, getattr(self, field), "a positive integer")
        _check_positive("min_expert_tokens", self.min_expert_tokens, "a positive integer")
        _check("sq_alpha", self.sq_alpha, 0 <= self.sq_alpha <= 1, "a number from 0 to 1")
        _check_choice("kv_cache_qformat", self.kv_cache_qformat, KV_CACHE_QFORMATS)
        _check(
            "calibration_dataset",
            self.calibration_dataset,
            bool(self.calibration_dataset.strip()),
            "pydoc, a file, or hf:NAME",
        )
        for name in ("exclude", "include"):
            patterns = getattr(self, name)
            _check(name, patterns, not isinstance(patterns, str), "a list of patterns")
            object.__setattr__(self, name, tuple(patterns))
            _check(name, patterns, all(patterns), "patterns that are not empty")
        _check("overrides", self.overrides, all(self.overrides), "patterns that are not empty")
        for pattern, recipe in self.overrides.items():
            where = f"overrides.{pattern}"
            if recipe is not None:
                check_recipe_name(recipe, where=where)
                _check(where, recipe, not is_file(recipe), "the name of a recipe, or null")
        for name in ("exclude", "include", "overrides"):
            if self.algorithm is None and getattr(self, name):
                raise ConfigError(
                    "without a recipe there are no layers to choose",
                    where=name,
                    found=getattr(self, name),
                    hint=f"leave {name} out, or set an algorithm",
                )

    @property
    def calibration_source(self) -> str:
        """The text source in the form that ``slimtron_common.data`` opens."""
        return _NEMO_DATASETS.get(self.calibration_dataset, (self.calibration_dataset, ""))[0]

    @property
    def calibration_text_field(self) -> str:
        """The field that holds a record's text."""
        return _NEMO_DATASETS.get(self.calibration_dataset, ("", "text"))[1]


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Where and how to write the quantized model."""

    path: Path
    """Directory to write; a string is taken too."""

    export_format: str = "hf"
    """``hf``, the unified checkpoint of vLLM, SGLang and TensorRT-LLM, or, with ModelOpt's
    quantizers and to be trained on, ``megatron``, a distributed checkpoint, or ``nemo``, that of
    NeMo 2. NeMo's default was ``trtllm``, which is refused."""

    dtype: str | int = "bf16"
    """Type of what stays unquantized: bf16, 16 or 32. NeMo's HF export ignored it and wrote
    float16."""

    decoder_type: str | None = None
    """Decoder name for ``trtllm``; the HF checkpoint takes it from the model."""

    inference_tp: int = 1
    """Tensor-parallel size for ``trtllm``; an HF checkpoint is cut by the engine loading it."""

    inference_pp: int = 1
    """Pipeline-parallel size for ``trtllm``; an HF checkpoint is cut by the engine loading it."""

    generate_sample: bool = False
    """NeMo's switch for a text that the quantized model writes. True is refused: the report
    measures the model instead."""

    def __post_init__(self) -> None:
        _check("path", self.path, bool(str(self.path)), "a directory to write")
        object.__setattr__(self, "path", Path(self.path))
        _check_choice("export_format", self.export_format, _EXPORT_FORMATS)
        if self.export_format == "trtllm":
            raise ConfigError(
                "TensorRT-LLM's own checkpoints are for its old engine builder",
                where="export_format",
                found=self.export_format,
                allowed="hf, megatron, nemo",
                hint="TensorRT-LLM loads hf directories, as vLLM and SGLang do",
            )
        _check_choice("dtype", str(self.dtype), tuple(_DTYPES))
        if self.generate_sample:
            raise ConfigError(
                "a sample text proves little, and this version writes none",
                where="generate_sample",
                found=True,
                allowed="false",
                hint="the report has perplexity, KL divergence and agreement; transformers and "
                "the inference engines generate from the exported directory",
            )
        for name, only in (("decoder_type", None), ("inference_tp", 1), ("inference_pp", 1)):
            if getattr(self, name) != only:
                raise ConfigError(
                    "only trtllm checkpoints have this setting",
                    where=name,
                    found=getattr(self, name),
                    hint=f"leave {name} out: what is written fits any layout",
                )

    @property
    def torch_dtype(self) -> str:
        """``dtype`` by torch's name: bfloat16, float16 or float32."""
        return _DTYPES[str(self.dtype)]


def _check(field: str, found: object, condition: bool, allowed: str) -> None:
    if not condition:
        raise ConfigError("out of range", where=field, found=repr(found), allowed=allowed)


def _check_positive(field: str, found: object, allowed: str) -> None:
    # A bool is an int: `true` in a YAML file would count as 1.
    _check(field, found, type(found) is int and found > 0, allowed)


def _check_choice(field: str, found: str, choices: tuple[str, ...]) -> None:
    _check(field, found, found in choices, ", ".join(choices))
