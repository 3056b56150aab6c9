"""Score a model in parts that a killed run does not do again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from slimtron_common.data import TokenDataset
from slimtron_common.parallel import ParallelContext
from slimtron_common.progress import stage
from slimtron_common.workdir import WorkDir
from slimtron_prune.job.opening import OpenModel
from slimtron_prune.scoring.collect import collect_scores
from slimtron_prune.scoring.scores import Scores, load_scores, merge_scores, save_scores

__all__ = ["score_in_parts"]

_PARTS = 8


def score_in_parts(
    model: OpenModel,
    dataset: TokenDataset,
    load: Callable[[], nn.Module],
    context: ParallelContext,
    work: WorkDir,
) -> Scores:
    """Scores a model on a text, each part of the text a stage of its own.

    Args:
        model: The model.
        dataset: The text.
        load: Returns the model in memory; not called if every part is finished.
        context: This process's place.
        work: Where the stages are kept.
    """
    architecture = model.architecture
    # Every part has equally many sequences for each data-parallel process; what is over, the last.
    rounds = dataset.num_sequences // context.dp_size
    count = max(1, min(_PARTS, rounds))
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(rounds), count)])
    parts = np.split(dataset.tokens, ends[:-1] * context.dp_size)
    scores = []
    for number, tokens in enumerate(parts, 1):
        name = f"scores-{number}-of-{count}"
        if not work.has(name):
            batches = TokenDataset(tokens).batches(
                model.config.scoring.micro_batch_size, context.dp_rank, context.dp_size
            )
            with stage(f"scores, part {number} of {count}"), work.stage(name) as output:
                part = collect_scores(load(), batches, architecture, context)
                if context.is_main:
                    save_scores(output.directory, part)
        scores.append(load_scores(work.directory(name), architecture))
    return merge_scores(scores)
