"""Recipe files: a recipe of one's own, in YAML or JSON.

A file holds these keys, all but the first two optional, and one of the first two::

    recipe: int4_awq            # one of Slimtron's, or modelopt:NAME, to start from
    quant_cfg: {...}            # or ModelOpt's own: a mapping of patterns, or a list of entries

    description: what it is for
    algorithm: {alpha_step: 0.05}   # settings of the recipe's calibration algorithm; beside
                                    # quant_cfg its name or a mapping with `method`
    block_size: 64              # in place of awq_block_size; a number, or auto
    include: ["*.mlp"]          # as in QuantizationConfig; the config's own come on top
    exclude: ["decoder.layers.0"]
    overrides: {"*.linear_fc2": fp8, "decoder.layers.1": null}

The JSON files that NeMo's ``Quantizer`` takes for ``algorithm`` are such files: ``quant_cfg`` and
``algorithm``. Entries for ``*[kv]_bmm_quantizer`` quantize the KV cache, where
``enable_kv_cache`` does not say otherwise. As in NeMo, the keys of ``block_sizes`` may be strings
and ``num_bits`` and ``scale_bits`` lists; ``e4m3`` stands for ``[4, 3]``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimtron_common.config import build_config
from slimtron_common.errors import ConfigError
from slimtron_common.integrations.modelopt import (
    QuantConfig,
    QuantizerEntry,
    check_attributes,
    from_modelopt,
)

__all__ = ["RecipeFile", "read_recipe_file"]

_FLOAT = re.compile(r"e(\d+)m(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """What a recipe file says."""

    recipe: str | None = None
    quant_cfg: dict[str, Any] | list[Any] | None = None
    description: str = ""
    algorithm: str | dict[str, Any] | None = None
    block_size: int | Literal["auto"] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.quant_cfg is None):
            raise ConfigError(
                "a recipe file starts from a recipe or holds a config of ModelOpt's",
                found="both" if self.recipe else "neither",
                allowed="`recipe` or `quant_cfg`",
            )
        if self.recipe is not None and isinstance(self.algorithm, str):
            raise ConfigError(
                "beside `recipe` this holds settings of the recipe's algorithm",
                where="algorithm",
                found=self.algorithm,
                allowed="a mapping, such as {alpha_step: 0.05}",
            )
        if self.block_size is not None and self.block_size != "auto" and self.block_size < 1:
            raise ConfigError(
                "out of range",
                where="block_size",
                found=self.block_size,
                allowed="a positive integer, or auto",
            )

    def modelopt_config(self) -> QuantConfig:
        """Returns ``quant_cfg`` and ``algorithm``, everything else switched off.

        Raises:
            ConfigError: An entry has another shape than ModelOpt's, or an attribute that the
                installed ModelOpt does not know.
        """
        config = from_modelopt(
            {"quant_cfg": _standardized(self.quant_cfg), "algorithm": self.algorithm}
        )
        for entry in config.entries:
            several = entry.attributes if isinstance(entry.attributes, tuple) else ()
            single = () if several else (entry.attributes or {},)
            for attributes in (*several, *single):
                check_attributes(attributes, where=f"quant_cfg.{entry.pattern}")
        # ModelOpt quantizes to 8 bits what no entry names.
        return QuantConfig((QuantizerEntry("*", enable=False), *config.entries), config.algorithm)


def read_recipe_file(path: Path) -> RecipeFile:
    """Reads a recipe file.

    Raises:
        ConfigError: It cannot be read, or something in it is unknown or out of range; names
            the file and the path inside it.
    """
    try:
        return build_config(RecipeFile, flags=_tree(path))
    except ConfigError as error:
        if str(path) not in str(error.where):
            error.where = f"{path}: {error.where}" if error.where else path
        raise


def _tree(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError("cannot be read", where=path, found=error.strerror) from error
    if path.suffix == ".json":
        try:
            tree = json.loads(content, object_pairs_hook=_without_repetition)
        except ValueError as error:
            raise ConfigError(f"is not valid JSON: {error}", where=path) from error
    else:
        from slimtron_common.yaml_loader import load_yaml

        tree = load_yaml(content, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError("does not hold a recipe", where=path, allowed="a mapping")
    return tree


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key appears twice")
    return tree


def _standardized(value: Any, key: str = "") -> Any:
    """Turns what JSON and YAML can say into what ModelOpt takes."""
    if key in ("num_bits", "scale_bits"):
        if isinstance(value, str) and (parts := _FLOAT.fullmatch(value)):
            return tuple(map(int, parts.groups()))
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, dict):
        return {
            int(name) if key == "block_sizes" and name.lstrip("-").isdigit() else name:
            _standardized(item, name)
            for name, item in value.items()
        }  # fmt: skip
    return [_standardized(item, key) for item in value] if isinstance(value, list) else value
