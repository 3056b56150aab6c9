"""Check a pruned model from its files alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.base import CONFIG_NAME
from slimtron_common.checkpoint.kinds import kind_of
from slimtron_common.errors import CheckpointError, VerificationError
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.measure import measure, plan_evaluation
from slimtron_common.manifest import MANIFEST_NAME, verify_manifest
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import Comparison
from slimtron_prune.job.transformers_check import check_against_transformers

__all__ = ["verify_directory"]


def verify_directory(
    directory: Path, *, against: str | None, source: str, num_tokens: int, seq_length: int
) -> Comparison:
    """Reads every file of a pruned model, builds it and runs it.

    Args:
        directory: The model, of any kind.
        against: The original's spec, to measure the distance to; or None.
        source: Text to measure on.
        num_tokens: Tokens of it.
        seq_length: Tokens in a sequence.

    Returns:
        What was measured, the original first if there is one.

    Raises:
        CheckpointError: A file is missing, changed, or not as its layout says.
        VerificationError: The weights are no numbers, or transformers computes other logits.
    """
    kind = kind_of(directory)
    if kind != "nemo2" and not (directory / CONFIG_NAME).is_file():
        raise CheckpointError("is no model", where=directory, found=f"no {CONFIG_NAME}")
    if (directory / MANIFEST_NAME).is_file():
        verify_manifest(directory)
    checkpoint = open_checkpoint(f"{kind}:{directory}")
    facts = {"Compared with transformers": "no: a distributed checkpoint"}
    with initialize_parallel() as context:
        dtype = checkpoint.compute_dtype("auto", context.device.type)
        model = build_model(checkpoint.architecture, context, dtype=dtype)
        checkpoint.load(model, context)
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise VerificationError("holds what is no number", where=directory, found=name)
        if kind == "hf":
            difference = check_against_transformers(
                directory, model, checkpoint.architecture, context
            )
            facts = {"Compared with transformers": f"logits differ by {difference:.1g} at most"}
        del model
    text = EvaluationConfig(source=source, num_tokens=num_tokens, seq_length=seq_length)
    found = measure(plan_evaluation(f"{kind}:{directory}", text, against=against))
    return replace(found, title=f"{directory.name}, reloaded", facts={**found.facts, **facts})
