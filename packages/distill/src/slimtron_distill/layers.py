"""Names of layers whose outputs are compared, and whether the two of a pair meet on a stage."""

from __future__ import annotations

import re
from collections.abc import Iterable

from slimtron_common.errors import ConfigError, ParallelismError

__all__ = ["check_layer_pairs", "parse_layer"]

_LAYER = re.compile(r"decoder\.layers\.(\d+)((?:\.\w+)*)")
_OTHER_MODULES = ("embedding", "decoder.final_layernorm")


def parse_layer(name: str) -> tuple[int | None, str]:
    """Splits the name of a module whose output is compared.

    Returns:
        The layer, counted from 0 over the whole model, and the rest of the name (``mlp``, or
        nothing); or None and the name of a module outside layers.

    Raises:
        ConfigError: It is no such name.
    """
    if name in _OTHER_MODULES:
        return None, name
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ConfigError(
            "no module by this name puts out the hidden state",
            where="intermediate_layer_pairs",
            found=name,
            allowed="decoder.layers.NUMBER, modules inside it, " + ", ".join(_OTHER_MODULES),
        )
    return int(match[1]), match[2].removeprefix(".")


def check_layer_pairs(
    pairs: Iterable[tuple[str, str]],
    student_layers: int,
    teacher_layers: int,
    *,
    num_stages: int = 1,
) -> None:
    """Refuses pairs that cannot be compared, knowing the models' depths alone.

    Args:
        pairs: Names of modules, as ``DistillationConfig.intermediate_layer_pairs`` has them.
        student_layers: Layers of the student.
        teacher_layers: Layers of the teacher.
        num_stages: Pipeline stages, virtual ones counted; each model's layers are shared out to
            them evenly.

    Raises:
        ConfigError: A model has no such layer.
        ParallelismError: A model's layers do not divide, or a pair lies on different stages.
    """
    depths = {"student": student_layers, "teacher": teacher_layers}
    for model, depth in depths.items():
        if depth % num_stages:
            raise ParallelismError(
                f"the pipeline's stages, virtual ones counted, must divide the {model}'s layers",
                where="parallel.pipeline_parallel_size",
                found=f"{num_stages} stages, {depth} layers",
            )
    for pair in pairs:
        stages = {}
        for (model, depth), name in zip(depths.items(), pair, strict=True):
            layer, module = parse_layer(name)
            if layer is None:
                stages[model] = 0 if module == "embedding" else num_stages - 1
                continue
            if layer >= depth:
                raise ConfigError(
                    f"the {model} has no such layer",
                    where="intermediate_layer_pairs",
                    found=name,
                    allowed=f"decoder.layers.0 to decoder.layers.{depth - 1}",
                )
            stages[model] = layer // (depth // num_stages)
        if stages["student"] != stages["teacher"]:
            raise ParallelismError(
                "the two layers of a pair must lie on the same pipeline stage",
                where="intermediate_layer_pairs",
                found=f"{pair[0]} on stage {stages['student']}, {pair[1]} on {stages['teacher']}",
                hint="pair layers of about the same relative depth; stages are counted from 0, "
                "virtual ones included",
            )
