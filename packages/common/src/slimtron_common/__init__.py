"""What the Slimtron packages share: parallelism, checkpoints, data, evaluation and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimtron_common.__about__ import __version__
from slimtron_common.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    ParallelismError,
    SlimtronError,
    UnsupportedModelError,
    VerificationError,
)

if TYPE_CHECKING:
    from slimtron_common.parallel import (
        ParallelConfig,
        ParallelContext,
        initialize_parallel,
        unwrap_model,
    )

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MissingDependencyError",
    "ParallelConfig",
    "ParallelContext",
    "ParallelismError",
    "SlimtronError",
    "UnsupportedModelError",
    "VerificationError",
    "__version__",
    "initialize_parallel",
    "unwrap_model",
]


def __getattr__(name: str) -> Any:
    # The parallel layer needs torch, which a command's --help must not wait for.
    if name in __all__:
        from slimtron_common import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
