"""The stage that measures what every candidate does to every group of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from slimtron_common.parallel import ParallelContext
from slimtron_common.progress import stage
from slimtron_common.workdir import WorkDir
from slimtron_quant.calibration.maxima import ForwardLoop
from slimtron_quant.job.mixed import MixedPlan
from slimtron_quant.mixed.divergence import Divergence, measure_groups
from slimtron_quant.mixed.sensitivity import Sensitivity
from slimtron_quant.quantizer import Quantizer

__all__ = ["measure_sensitivity"]


def measure_sensitivity(
    mixed: MixedPlan,
    context: ParallelContext,
    work: WorkDir,
    *,
    load: Callable[[], nn.Module],
    calibrate: ForwardLoop | None,
    micro_batch_size: int,
    vocab_size: int,
) -> Sensitivity:
    """Measures the candidates one after the other; those of a stage that is finished are kept.

    Args:
        mixed: The candidates and the text.
        context: This process's place.
        work: Where each candidate's outcome is kept, as stage ``sensitivity-N``.
        load: Returns the original model, a new one each time.
        calibrate: The calibration's text.
        micro_batch_size: Sequences in a micro-batch.
        vocab_size: True vocabulary.

    Returns:
        The same on every process.
    """
    candidates, found = mixed.candidates, {}
    for number, (name, expected) in enumerate(mixed.expected.candidates.items()):
        key, title = f"sensitivity-{number}", f"sensitivity to {name}"
        if not work.has(key):
            options = candidates.storage.options
            groups = [group for group in candidates.storage.groups if name in options[group.name]]
            batches = mixed.text.batches(micro_batch_size, context.dp_rank, context.dp_size)
            with stage(title), work.stage(key) as output:
                model = load()
                divergence = Divergence(model, batches, context, vocab_size=vocab_size)
                Quantizer(candidates.candidate(name)).quantize(model, calibrate)
                output.result = measure_groups(model, groups, divergence, description=title)
                # Before the next one loads.
                del model, divergence
        found[name] = replace(expected, divergence=work.result(key))
    return replace(mixed.expected, candidates=found)
