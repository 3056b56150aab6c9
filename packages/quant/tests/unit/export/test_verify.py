from __future__ import annotations

import math
from pathlib import Path

import pytest

from slimtron_common.errors import VerificationError
from slimtron_common.evaluation import Distance, Evaluation
from slimtron_quant.export.verify import check_agreement


def evaluation(loss: float, *, tokens: int = 4096, **kl: float) -> Evaluation:
    distances = {name: Distance(kl=value, agreement=0.9) for name, value in kl.items()}
    return Evaluation(perplexity=math.exp(loss), loss=loss, num_tokens=tokens, distances=distances)


@pytest.mark.parametrize(
    ("exported", "kl", "tokens"),
    [
        (3.0, 0.0, 4096),
        (3.009, 0.0, 4096),
        # 3.4% of perplexity is 2.2 standard errors of such noise.
        (3.034, 0.47, 4096),
    ],
)
def test_rounding_and_its_noise_pass(exported: float, kl: float, tokens: int) -> None:
    memory = evaluation(3.0, original=0.8)
    check_agreement(memory, evaluation(exported, tokens=tokens, memory=kl), where=Path("out"))


@pytest.mark.parametrize(
    ("exported", "kl", "tokens"),
    [
        # The same difference, on enough text to tell.
        (3.034, 0.47, 100_000),
        # Further away than the original.
        (3.034, 0.9, 4096),
        (3.02, 0.001, 4096),
        (2.95, 0.01, 4096),
    ],
)
def test_another_model_fails(exported: float, kl: float, tokens: int) -> None:
    memory = evaluation(3.0, original=0.8)
    with pytest.raises(VerificationError, match="is not the model that was in memory"):
        check_agreement(memory, evaluation(exported, tokens=tokens, memory=kl), where=Path("out"))
