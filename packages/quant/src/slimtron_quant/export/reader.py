"""Read an exported directory back, from its files alone and without ModelOpt."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtron_common.checkpoint.base import CONFIG_NAME, read_json
from slimtron_common.checkpoint.huggingface import SafetensorsDirectory
from slimtron_common.checkpoint.weights import bound_parameters, load_weights
from slimtron_common.errors import CheckpointError
from slimtron_common.models import Architecture
from slimtron_common.models.huggingface import architecture_from_config
from slimtron_common.models.mapping import model_parameters
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext
from slimtron_quant.export.huggingface import QUANT_CONFIG_NAME
from slimtron_quant.export.kv_cache import KvCacheHook, kv_scale_names
from slimtron_quant.formats import FORMATS, Format
from slimtron_quant.formats.base import take
from slimtron_quant.formats.kv_cache import attentions, kv_cache_format_announced

__all__ = ["ExportedModel"]

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class ExportedModel:
    """A quantized Hugging Face directory.

    Args:
        path: The directory.

    Raises:
        CheckpointError: A file is missing, corrupt, or contradicts another.
        UnsupportedModelError: The architecture or format is unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_json(path / CONFIG_NAME)
        announced = config.pop("quantization_config", None)
        if not isinstance(announced, dict):
            raise CheckpointError(
                "the model is not quantized",
                where=path / CONFIG_NAME,
                found="no quantization_config",
            )
        self.architecture: Architecture = architecture_from_config(
            config, source=str(path / CONFIG_NAME)
        )
        self.quantization = read_json(path / QUANT_CONFIG_NAME).get("quantization", {})
        self.kv_cache = kv_cache_format_announced(self.quantization.get("kv_cache_quant_algo"))
        """Format of the KV cache; None where it is not quantized."""
        self.dtype: torch.dtype = getattr(torch, self.architecture.dtype)
        self.tensors = SafetensorsDirectory(path)
        self._check_announcements(announced)
        self._check_tensors()
        self._claims = {
            target: group["weights"]["num_bits"]
            for group in announced.get("config_groups", {}).values()
            for target in group["targets"]
        }

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the tokenizer's files."""
        return self.path

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Format of every quantized module by its Hugging Face name."""
        mixed = self.quantization.get("quantized_layers", {})
        excluded = set(self.quantization.get("exclude_modules", []))
        if "*" in excluded:
            return {}
        found = {}
        for module in self._linear_modules:
            settings = mixed.get(module) if mixed else self.quantization
            if settings and module not in excluded:
                found[module] = self._format(settings)
        return found

    @property
    def weight_bytes(self) -> int:
        """Size of the safetensors files."""
        return self.tensors.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all parameters, their scales and unquantized tensors included."""
        of_cache = self._kv_scale_names
        headers = self.tensors.headers.items()
        bits = sum(_bits(*header) for name, header in headers if name not in of_cache)
        parameters = sum(
            torch.Size(shape).numel()
            for _, rule in model_parameters(self.architecture)
            for shape in rule.hf_shapes
        )
        return bits / parameters

    def stored_bits(self, name: str) -> int:
        """Returns what a tensor takes on disk by its Hugging Face name, scales included."""
        module = name.removesuffix(".weight")
        names = self._weight_names(module) if module in self.formats else [name]
        return sum(_bits(*self.tensors.headers[stored]) for stored in names)

    def read(self, name: str) -> Tensor:
        """Returns a weight by its Hugging Face name, decoded to float32 where it was packed.

        A factor on the input (``pre_quant_scale``) stays with the input: see ``build``.
        """
        module = name.removesuffix(".weight")
        fmt = self.formats.get(module)
        if fmt is None:
            return self.tensors.read(name)
        return fmt.unpack(self._packed(module), dtype=torch.float32, shape=self._shapes[name])

    def describe(self) -> str:
        """Returns in a line how many modules are stored in which format."""
        formats = Counter(fmt.name for fmt in self.formats.values())
        counts = ", ".join(f"{count} modules {name}" for name, count in formats.items())
        return counts or "all weights as they were"

    def check_values(self) -> None:
        """Reads and decodes every tensor.

        Raises:
            CheckpointError: One has another type or shape than its layout says or is no part of
                it, a scale is not a positive number of a likely size, a value is not finite, or
                weights take another number of bits than ``config.json`` claims.
        """
        for module, fmt in self.formats.items():
            tensors = _Remembering(self._packed(module))
            fmt.unpack(tensors, dtype=torch.float32, shape=self._shapes[f"{module}.weight"])
            unread = tensors.keys() - tensors.read
            if unread := {name for name in unread if f"{module}.{name}" not in self._shapes}:
                raise CheckpointError(
                    f"a tensor has no place in the format {fmt.name}",
                    where=self.path,
                    found=f"{module}.{min(unread)}",
                )
        for name in self._shapes:
            if not bool(self.read(name).isfinite().all()):
                raise CheckpointError("a weight is not finite", where=self.path, found=name)
        for layer in range(self.architecture.num_layers if self.kv_cache else 0):
            self.kv_scales(layer)
        self._check_bits()

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the scales of a layer's keys and values in a quantized KV cache.

        Args:
            layer: Counted from 0.

        Raises:
            CheckpointError: One is no float32 scalar, or not a positive number.
        """
        keys, values = (
            take({name: self.tensors.read(name)}, name, torch.float32, ())
            for name in kv_scale_names(layer)
        )
        return keys, values

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Type to run the model in: as stored on a GPU, float32 on the CPU."""
        return self.dtype if device.type == "cuda" else torch.float32

    def build(
        self, context: ParallelContext, *, dtype: torch.dtype, layer: int | None = None
    ) -> nn.Module:
        """Builds a Megatron-Core model that computes what an engine would compute.

        Weights are decoded; inputs are multiplied by their factor and rounded to the format
        by hooks, and so are keys and values, with arithmetic of our own.

        Args:
            context: This process's place.
            dtype: Type to compute in.
            layer: The one layer to build, as in ``build_model``.
        """
        # Transformer Engine's fused layers would hide the linear layer's input from the hook.
        model = build_model(
            self.architecture, context, dtype=dtype, layer_spec="local", layer=layer
        )
        load_weights(model, self.architecture, context, self.read)
        for bound in bound_parameters(model, self.architecture):
            module = bound.rule.hf_names[0].removesuffix(".weight")
            if module not in self.formats or bound.is_copy:
                continue
            names = self._names_of.get(module, [])
            factor, scale = (
                self.tensors.read(name) if (name := f"{module}.{suffix}") in names else None
                for suffix in ("pre_quant_scale", "input_scale")
            )
            if factor is not None and bound.rule.layout.dim == -1:
                factor = factor.chunk(context.tp_size)[context.tp_rank]
            hook = _InputHook(self.formats[module], factor, scale, context.device)
            model.get_submodule(bound.name.removesuffix(".weight")).register_forward_pre_hook(hook)
        if self.kv_cache is not None:
            for block, attention in attentions(model):
                scales = (
                    scale.to(context.device) for scale in self.kv_scales(block.layer_number - 1)
                )
                attention.register_forward_pre_hook(KvCacheHook(self.kv_cache, *scales))
        self.tensors.close()
        return model

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for _, rule in model_parameters(self.architecture)
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }

    @cached_property
    def _linear_modules(self) -> list[str]:
        return [
            name.removesuffix(".weight")
            for name, shape in self._shapes.items()
            if len(shape) == 2 and "embed_tokens" not in name
        ]

    def _packed(self, module: str) -> dict[str, Tensor]:
        prefix = f"{module}."
        return {
            name.removeprefix(prefix): self.tensors.read(name)
            for name in self._weight_names(module)
        }

    def _weight_names(self, module: str) -> list[str]:
        return [n for n in self._names_of.get(module, []) if n not in self._kv_scale_names]

    @cached_property
    def _kv_scale_names(self) -> set[str]:
        layers = range(self.architecture.num_layers if self.kv_cache else 0)
        return {name for layer in layers for name in kv_scale_names(layer)}

    @cached_property
    def _names_of(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.tensors.names:
            names.setdefault(name.rpartition(".")[0], []).append(name)
        return names

    def _format(self, settings: dict[str, Any]) -> Format:
        for fmt, has_factors in itertools.product(FORMATS.values(), (False, True)):
            expected = fmt.settings(settings.get("group_size"), has_input_factors=has_factors)
            if all(settings.get(key) == value for key, value in expected.items()):
                return fmt
        raise CheckpointError(
            "the quantization is of no known format",
            where=self.path / QUANT_CONFIG_NAME,
            found=settings,
            allowed=", ".join(sorted({fmt.quant_algo for fmt in FORMATS.values()})),
        )

    def _check_announcements(self, announced: dict[str, Any]) -> None:
        for key, ours in (
            ("quant_algo", self.quantization.get("quant_algo")),
            ("ignore", self.quantization.get("exclude_modules")),
            ("kv_cache_scheme", self.kv_cache and self.kv_cache.scheme),
        ):
            if announced.get(key) != ours:
                raise CheckpointError(
                    f"{CONFIG_NAME} and {QUANT_CONFIG_NAME} disagree on {key}",
                    where=self.path,
                    found=f"{announced.get(key)!r} and {ours!r}",
                )

    def _check_tensors(self) -> None:
        needed = set(self._shapes) | self._kv_scale_names
        expected = set(needed)
        for module in self.formats:
            expected |= {n for n in self._weight_names(module) if not n.endswith(".bias")}
        missing = sorted(needed - set(self.tensors.names))
        unknown = sorted(set(self.tensors.names) - expected)
        if missing or unknown:
            raise CheckpointError(
                "the tensors on disk are not those of the model",
                where=self.path,
                found=f"missing {missing[:3]}, unexpected {unknown[:3]}",
            )
        for name, shape in self._shapes.items():
            is_packed = name.removesuffix(".weight") in self.formats
            stored = self.tensors.headers[name]
            if not is_packed and stored != (_TYPES.get(self.dtype), shape):
                raise CheckpointError(
                    "a tensor that is not quantized is not as the config says",
                    where=self.path,
                    found=f"{name}: {stored[0]} {stored[1]}",
                    allowed=f"{_TYPES.get(self.dtype)} {shape}",
                )

    def _check_bits(self) -> None:
        for module in self.formats:
            name = f"{module}.weight"
            found = _bits(*self.tensors.headers[name]) / torch.Size(self._shapes[name]).numel()
            claimed = self._claims.get(module, self._claims.get("Linear", found))
            if found != claimed:
                raise CheckpointError(
                    "the weights take another number of bits than the config claims",
                    where=self.path,
                    found=f"{name}: {found:g} bits for a weight",
                    allowed=f"{claimed:g}",
                )


class _Remembering(dict[str, Tensor]):
    """Remembers which of a layer's tensors its format asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, suffix: str) -> Tensor:
        self.read.add(suffix)
        return super().__getitem__(suffix)

    def get(self, suffix: str, default: Any = None) -> Any:
        self.read.add(suffix)
        return super().get(suffix, default)


class _InputHook:
    """Scales and rounds a linear layer's input before it is multiplied."""

    def __init__(
        self, fmt: Format, factor: Tensor | None, scale: Tensor | None, device: torch.device
    ) -> None:
        self.format = fmt
        self.factor = None if factor is None else factor.to(device)
        self.scale = None if scale is None else scale.to(device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        if self.factor is not None:
            x = x * self.factor.to(x.dtype)
        return (self.format.quantize_activation(x, self.scale), *args[1:])


def _bits(dtype: str, shape: tuple[int, ...]) -> int:
    width = {"F64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16}.get(dtype, 8)
    return width * torch.Size(shape).numel()
