"""The ``context`` of a NeMo 2 checkpoint: what the model is, in NeMo's words and without NeMo.

NeMo opens ``io.json``, in which fiddle's serialization tells what is called with what; tools
around it read ``model.yaml``, which says the same of the model for people. Both name classes and
functions by their import path. No pickle is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimtron_common.checkpoint.huggingface import write_json
from slimtron_common.models.nemo_classes import Target

__all__ = ["write_context"]

_TRAINER = Target(
    "nemo.lightning.pytorch.trainer.Trainer",
    {
        "devices": 1,
        "strategy": Target(
            "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy", {}
        ),
    },
)


def write_context(directory: Path, model: Target) -> None:
    """Writes what NeMo builds a model of.

    Args:
        directory: The checkpoint's ``context``.
        model: The model, as NeMo's class is called.
    """
    import yaml

    context = Target("nemo.lightning.io.pl.TrainerContext", {"model": model, "trainer": _TRAINER})
    write_json(directory / "io.json", _serialized(context))
    text = yaml.safe_dump(_plain(model), sort_keys=True)
    (directory / "model.yaml").write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if not isinstance(value, Target):
        return value
    if value.arguments is None:
        return {"_target_": value.path, "_call_": False}
    arguments = {name: _plain(argument) for name, argument in value.arguments.items()}
    return {"_target_": value.path, **arguments}


def _serialized(root: Target) -> dict[str, Any]:
    """Serializes a tree of calls as fiddle 0.3 does."""
    objects: dict[str, Any] = {}

    def add(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, tuple):
            return _tuple([add(item, f"{path}[{i}]") for i, item in enumerate(value)])
        if not isinstance(value, Target):
            return {"type": "leaf", "value": value, "paths": [path]}
        if value.arguments is None:
            return {**_symbol(value.path), "paths": [path]}
        items = [
            [f"Attr(name={name!r})", add(argument, f"{path}.{name}")]
            for name, argument in value.arguments.items()
        ]
        key = f"{value.path.rpartition('.')[2].lower()}_{len(objects) + 1}"
        objects[key] = {
            "type": _symbol("fiddle._src.config.Config"),
            "items": items,
            "metadata": _call(value.path, value.arguments),
            # NeMo finds the part that it is asked for by these.
            "paths": [path],
        }
        return {"type": "ref", "key": key}

    root_key = add(root, "<root>")
    counts = dict.fromkeys(objects, 1)
    return {"root": root_key, "objects": objects, "refcounts": counts, "version": "0.0.1"}


def _call(path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    kind = _symbol("fiddle._src.config.BuildableTraverserMetadata")
    nothing = {"type": _symbol("builtins.dict"), "items": [], "metadata": _tuple([])}
    fields = {
        "fn_or_cls": _symbol(path),
        "argument_names": _tuple(arguments),
        "argument_tags": nothing,
        "argument_history": nothing,
    }
    items = [[f"Attr(name={name!r})", value] for name, value in fields.items()]
    return {"type": kind, "items": items, "metadata": kind}


def _tuple(values: Iterable[Any]) -> dict[str, Any]:
    items = [[f"Index(index={i})", value] for i, value in enumerate(values)]
    return {"type": _symbol("builtins.tuple"), "items": items, "metadata": None}


def _symbol(path: str) -> dict[str, str]:
    module, _, name = path.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}
