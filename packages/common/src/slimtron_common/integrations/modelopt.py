"""What NVIDIA ModelOpt's versions disagree on, the shape of a quantization config above all.

Up to 0.43 a config's ``quant_cfg`` maps a pattern of quantizer names to attributes; since 0.44
it is a list of entries applied in order. Both become one ``QuantConfig`` here, and
``to_modelopt`` returns the shape that the installed version takes. ModelOpt's own configs are
module globals: everything that crosses this module is a deep copy.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from slimtron_common.errors import ConfigError, MissingDependencyError

__all__ = [
    "QuantConfig",
    "QuantizerEntry",
    "check_attributes",
    "config_names",
    "from_modelopt",
    "functions_put_back",
    "make_quantizer",
    "named_config",
    "recipe_config",
    "recipe_names",
    "rotates",
    "shared_experts",
    "takes_mappings",
    "to_modelopt",
]

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QuantizerEntry:
    """One instruction to every quantizer whose name matches ``pattern``."""

    pattern: str
    """Matched against a quantizer's dotted name as ``fnmatch`` does: ``*`` crosses dots."""

    attributes: Attributes | tuple[Attributes, ...] | None = None
    """Attributes that replace the quantizer's, several to quantize in sequence; None keeps
    what it has."""

    enable: bool | None = None
    """Switches the quantizer on or off; None switches it on where there are attributes."""

    parent_class: str | None = None
    """Restricts the match to quantizers inside modules of this class (``nn.Embedding``)."""


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """A quantization config, independent of ModelOpt's version."""

    entries: tuple[QuantizerEntry, ...]
    """Applied in order: a later one overrides an earlier one where both match."""

    algorithm: str | Attributes | None = None
    """Calibration algorithm, by name or as its settings with the key ``method``."""

    def with_entries(self, *entries: QuantizerEntry) -> QuantConfig:
        """Returns this config with ``entries`` applied last."""
        return replace(self, entries=(*self.entries, *entries))

    def with_algorithm(self, algorithm: str | Attributes | None) -> QuantConfig:
        """Returns this config with another calibration algorithm."""
        return replace(self, algorithm=algorithm)

    def with_block_size(self, block_size: int) -> QuantConfig:
        """Returns this config with ``block_size`` in place of every size of a block."""
        entries = (replace(e, attributes=_resized(e.attributes, block_size)) for e in self.entries)
        return replace(self, entries=tuple(entries))


def named_config(name: str) -> QuantConfig:
    """Returns a copy of the installed ModelOpt's config ``name`` (``FP8_DEFAULT_CFG``).

    Raises:
        MissingDependencyError: ModelOpt is absent, or has no config of this name.
    """
    config = getattr(_quantization(), name, None)
    if not isinstance(config, Mapping):
        from importlib.metadata import version

        raise MissingDependencyError(
            f"the installed ModelOpt has no quantization config {name}",
            found=f"nvidia-modelopt {version('nvidia-modelopt')}",
            hint="pip install --upgrade nvidia-modelopt",
        )
    return from_modelopt(config)


def config_names() -> list[str]:
    """Returns the names that ``named_config`` takes.

    Raises:
        MissingDependencyError: ModelOpt is absent.
    """
    module = _quantization()
    return [
        name
        for name in sorted(vars(module))
        if name.isupper() and "quant_cfg" in (getattr(module, name) or ())
    ]


def recipe_names() -> list[str]:
    """Returns the names that ``recipe_config`` takes; none where ModelOpt has no recipe files.

    Raises:
        MissingDependencyError: ModelOpt is absent.
    """
    _quantization()
    spec = find_spec("modelopt_recipes")
    roots = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    files = [(root, file) for root in roots for file in sorted(root.glob("*/**/ptq/*.yaml"))]
    return [
        file.relative_to(root).with_suffix("").as_posix()
        for root, file in files
        # Parts that recipes are made of, not recipes.
        if file.relative_to(root).parts[0] != "configs" and "\nquantize:" in file.read_text("utf-8")
    ]


def recipe_config(name: str) -> QuantConfig:
    """Returns the config of one of ModelOpt's recipe files for post-training quantization.

    Args:
        name: One of ``recipe_names``.
    """
    from modelopt.recipe import load_recipe

    with contextlib.redirect_stdout(io.StringIO()):
        recipe = load_recipe(name)
    return from_modelopt(_plain(recipe.quantize))


def check_attributes(attributes: Attributes, *, where: str) -> None:
    """Compares attributes of a quantizer with what the installed ModelOpt knows.

    Raises:
        ConfigError: One is unknown or out of range.
        MissingDependencyError: ModelOpt is absent.
    """
    _quantization()
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from pydantic import ValidationError

    try:
        QuantizerAttributeConfig(**attributes)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(
            "ModelOpt does not take it: " + problem["msg"].rstrip(", "),
            where=".".join((where, *map(str, problem["loc"]))),
            found=problem["input"],
        ) from None


def make_quantizer(settings: Sequence[Attributes]) -> Any:
    """Returns a quantizer of ModelOpt's with these attributes.

    Args:
        settings: Attributes of each quantizer in sequence; none for one that is off.

    Raises:
        MissingDependencyError: ModelOpt is absent.
    """
    _quantization()
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    quantizers = [TensorQuantizer(QuantizerAttributeConfig(**item)) for item in settings]
    if not quantizers:
        return TensorQuantizer(QuantizerAttributeConfig(enable=False))
    return quantizers[0] if len(quantizers) == 1 else SequentialQuantizer(*quantizers)


def rotates(quantizer: Any) -> bool:
    """Tells whether a quantizer rotates what it is given first."""
    # ModelOpt 0.37 has the setting alone, a bool.
    return bool(getattr(quantizer, "rotate_is_enabled", quantizer._rotate))


@contextlib.contextmanager
def functions_put_back() -> Iterator[None]:
    """Puts back the functions that ModelOpt replaces while a layer computes, if that fails.

    It leaves them replaced otherwise, and every model of the process that computes later would
    recurse without end.
    """
    from megatron.core.tensor_parallel import layers
    from torch.nn import functional

    modules = (functional, layers)
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, names in zip(modules, before, strict=True):
            for name in vars(module).keys() - names.keys():
                delattr(module, name)
            vars(module).update(names)
        raise


@contextlib.contextmanager
def shared_experts(experts: Sequence[Any]) -> Iterator[None]:
    """Lets ModelOpt put quantizers into experts that several processes share out.

    ModelOpt refuses tensor together with expert parallelism, which its own distributed checkpoints
    do not hold. It also exchanges scales between different processes' experts: those of inputs,
    where it refuses an expert that saw no token, and with SmoothQuant those of weights, which
    belong to other experts. What is converted inside exchanges nothing with other experts; its
    user makes the scales of inputs the same.

    Args:
        experts: Megatron-Core's ``SequentialMLP`` modules, before their conversion.
    """
    from modelopt.torch.utils.distributed import ParallelState

    configs = [module.config for module in experts]
    for module in experts:
        module.config = copy.copy(module.config)
        module.config.tensor_model_parallel_size = 1
    try:
        yield
    finally:
        for module, config in zip(experts, configs, strict=True):
            module.config = config
    for module in experts:
        # Megatron-Core 0.15's own module does not keep the group.
        tp_group = module.local_experts[0].linear_fc1.tp_group
        state = ParallelState(module.dp_group, tp_group)
        for expert in module.local_experts:
            expert.linear_fc1.parallel_state = expert.linear_fc2.parallel_state = state


def from_modelopt(config: Mapping[str, Any]) -> QuantConfig:
    """Reads a ModelOpt config of either generation.

    Args:
        config: Mapping with ``quant_cfg`` and, where it calibrates, ``algorithm``.

    Raises:
        ConfigError: An entry is of neither shape.
    """
    quant_cfg = config.get("quant_cfg")
    if isinstance(quant_cfg, Mapping):
        entries = _from_mapping(quant_cfg)
    elif isinstance(quant_cfg, Sequence) and not isinstance(quant_cfg, str):
        entries = map(_from_entry, quant_cfg)
    else:
        raise ConfigError(
            "not a ModelOpt quantization config",
            where="quant_cfg",
            found=quant_cfg,
            allowed="a mapping of patterns, or a list of entries",
        )
    return QuantConfig(tuple(entries), _plain(config.get("algorithm")))


def to_modelopt(config: QuantConfig) -> dict[str, Any]:
    """Returns ``config`` as the installed ModelOpt's ``quantize`` takes it.

    Raises:
        MissingDependencyError: ModelOpt is absent.
    """
    mapped = takes_mappings()
    return {
        "quant_cfg": _to_mapping(config.entries) if mapped else _to_list(config.entries),
        "algorithm": copy.deepcopy(config.algorithm),
    }


def takes_mappings() -> bool:
    """Tells whether the installed ModelOpt is of the generation whose configs are mappings.

    Raises:
        MissingDependencyError: ModelOpt is absent.
    """
    return isinstance(_quantization().FP8_DEFAULT_CFG["quant_cfg"], Mapping)


def _quantization() -> ModuleType:
    try:
        import modelopt.torch.quantization as quantization
    except ModuleNotFoundError as error:
        if error.name != "modelopt":
            raise
        raise MissingDependencyError(
            "quantization needs NVIDIA ModelOpt", hint="pip install nvidia-modelopt"
        ) from error
    module: ModuleType = quantization
    return module


def _plain(value: Any) -> Any:
    """A deep copy, ModelOpt's pydantic objects turned into the dicts that they were set from."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_unset=True)
    return copy.deepcopy(value)


def _resized(
    attributes: Attributes | tuple[Attributes, ...] | None, block_size: int
) -> Attributes | tuple[Attributes, ...] | None:
    if isinstance(attributes, tuple):
        return tuple(_resize(item, block_size) for item in attributes)
    return None if attributes is None else _resize(attributes, block_size)


def _resize(attributes: Attributes, block_size: int) -> Attributes:
    blocks = attributes.get("block_sizes") or {}
    resized = {dim: block_size for dim, size in blocks.items() if _is_block(dim, size)}
    return {**attributes, "block_sizes": {**blocks, **resized}} if resized else attributes


def _is_block(dim: object, size: object) -> bool:
    # Beside sizes by dimension there are "type" and "scale_bits"; a size of None is the whole
    # dimension.
    return isinstance(dim, int) and size is not None


def _from_entry(entry: Any) -> QuantizerEntry:
    fields = _plain(entry)
    if not isinstance(fields, Mapping) or "quantizer_name" not in fields:
        raise ConfigError(
            "an entry must be a mapping with quantizer_name", where="quant_cfg", found=entry
        )
    return _entry(
        fields["quantizer_name"],
        fields.get("cfg"),
        enable=fields.get("enable"),
        parent_class=fields.get("parent_class"),
    )


def _from_mapping(quant_cfg: Mapping[str, Any]) -> Iterator[QuantizerEntry]:
    # That generation applies "default" before everything else, wherever it stands.
    if "default" in quant_cfg:
        yield _entry("*", quant_cfg["default"])
    for key, value in quant_cfg.items():
        if isinstance(key, str) and key.startswith("nn."):
            for pattern, attributes in value.items():
                yield _entry(pattern, attributes, parent_class=key)
        elif key != "default":
            yield _entry(key, value)


def _entry(
    pattern: Any,
    attributes: Any,
    *,
    enable: bool | None = None,
    parent_class: str | None = None,
) -> QuantizerEntry:
    """Builds an entry, lifting ``enable`` out of the attributes that it may stand among."""
    sequential = isinstance(attributes, (list, tuple))
    items = [_plain(item) for item in (attributes if sequential else [attributes or {}])]
    if not isinstance(pattern, str) or not all(isinstance(item, dict) for item in items):
        raise ConfigError(
            "an entry is a pattern of quantizer names with a mapping of attributes",
            where="quant_cfg",
            found={pattern: attributes},
        )
    switches = {item.pop("enable") for item in items if "enable" in item}
    if len(switches) > 1:
        raise ConfigError(
            "quantizers in sequence are switched on or off together",
            where=f"quant_cfg.{pattern}",
            found=attributes,
        )
    return QuantizerEntry(
        pattern,
        tuple(items) if sequential else (items[0] or None),
        enable if enable is not None else next(iter(switches), None),
        parent_class,
    )


def _to_list(entries: Sequence[QuantizerEntry]) -> list[dict[str, Any]]:
    return [
        {
            "quantizer_name": entry.pattern,
            **({} if entry.parent_class is None else {"parent_class": entry.parent_class}),
            **({} if entry.attributes is None else {"cfg": _attributes(entry)}),
            **({} if entry.enable is None else {"enable": entry.enable}),
        }
        for entry in entries
    ]


def _to_mapping(entries: Sequence[QuantizerEntry]) -> dict[str, Any]:
    """The keys' order is the order of application; a key given again moves to the end."""
    quant_cfg: dict[str, Any] = {}
    for entry in entries:
        scope = quant_cfg
        if entry.parent_class is not None:
            scope = quant_cfg.setdefault(entry.parent_class, {})
        earlier = scope.pop(entry.pattern, {})
        value = earlier if entry.attributes is None else _attributes(entry)
        if entry.enable is not None:
            value = (
                [{**item, "enable": entry.enable} for item in value]
                if isinstance(value, list)
                else {**value, "enable": entry.enable}
            )
        scope[entry.pattern] = value
    return quant_cfg


def _attributes(entry: QuantizerEntry) -> dict[str, Any] | list[dict[str, Any]]:
    if isinstance(entry.attributes, tuple):
        return [copy.deepcopy(dict(item)) for item in entry.attributes]
    return copy.deepcopy(dict(entry.attributes or {}))
