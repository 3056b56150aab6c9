"""Whether student and teacher speak of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping

from slimtron_common.checkpoint.base import Checkpoint, has_tokenizer
from slimtron_common.errors import ConfigError

__all__ = ["shared_vocab_size"]


def shared_vocab_size(student: Checkpoint, teacher: Checkpoint) -> int:
    """Tells how many entries of their vocabularies the two models share, without any weights.

    Models of one family often pad one vocabulary to different sizes. Then their tokenizers must
    show that what differs is padding; where both have one, they must agree in any case.

    Args:
        student: The student.
        teacher: The teacher.

    Returns:
        The first so many entries mean the same to both; a larger vocabulary's rest is padding.

    Raises:
        ConfigError: A token means different things to the two, or nothing shows that it does not.
        CheckpointError: A tokenizer cannot be read.
    """
    sizes = student.architecture.vocab_size, teacher.architecture.vocab_size
    if not all(has_tokenizer(model.tokenizer_path) for model in (student, teacher)):
        if sizes[0] != sizes[1]:
            raise ConfigError(
                "student and teacher differ in vocabulary",
                where="teacher",
                found=f"{sizes[1]} entries, the student's {sizes[0]}",
                hint="put the tokenizer's files beside both models: they tell whether the rest is "
                "padding",
            )
        return sizes[0]
    ours, theirs = (_vocabulary(checkpoint) for checkpoint in (student, teacher))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ConfigError(
                "student and teacher differ in vocabulary",
                where="teacher",
                found=f"token {index} is {theirs.get(index)!r}, the student's {ours.get(index)!r}",
                hint="distillation on logits needs a teacher with the student's tokenizer",
            )
    return min(sizes)


def _vocabulary(checkpoint: Checkpoint) -> Mapping[int, str]:
    return {index: token for token, index in checkpoint.tokenizer().get_vocab().items()}
