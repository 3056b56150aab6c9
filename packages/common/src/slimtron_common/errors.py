"""The errors that Slimtron shows its users.

Every error states what is wrong, where, what was found, what is allowed and what to do
next. Library code raises them; only a command turns one into an exit code.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MissingDependencyError",
    "ParallelismError",
    "SlimtronError",
    "UnsupportedModelError",
    "VerificationError",
]


class SlimtronError(Exception):
    """Base of every error that is meant for the user.

    Args:
        message: What is wrong, in one sentence.
        where: The config field, file or module concerned (``calibration.num_tokens``).
        found: The offending value.
        allowed: What would have been accepted.
        hint: What the user should do.
    """

    exit_code = 1
    """The process exit code a command ends with: 1 failed, 2 refused."""

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        found: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.found = found
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        head = self.message if self.where is None else f"{self.where}: {self.message}"
        details = [
            f"  {label}: {value}"
            for label, value in (
                ("found", self.found),
                ("allowed", self.allowed),
                ("do this", self.hint),
            )
            if value is not None
        ]
        return "\n".join([head, *details])

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(cls: type[SlimtronError], message: str, state: dict[str, object]) -> SlimtronError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class ConfigError(SlimtronError, ValueError):
    """A configuration field, flag or combination of them cannot be accepted.

    A ValueError too, so that pydantic reports where in a config a ``__post_init__`` raised it.
    """

    exit_code = 2


class CheckpointError(SlimtronError):
    """A checkpoint, dataset or output path is missing, corrupt, or cannot be written."""

    exit_code = 2


class UnsupportedModelError(SlimtronError):
    """The model's architecture, or one of its features, is not supported."""

    exit_code = 2


class ParallelismError(SlimtronError):
    """The parallel layout fits neither the model nor the processes that were started."""

    exit_code = 2


class MissingDependencyError(SlimtronError):
    """A package that this job needs is absent or of a version that does not work."""

    exit_code = 2


class VerificationError(SlimtronError):
    """What was written, reloaded, differs from what was meant."""

    exit_code = 1
