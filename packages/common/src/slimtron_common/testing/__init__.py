"""Real processes and small real models for tests."""

from slimtron_common.testing.models import write_tiny_model
from slimtron_common.testing.ranks import RankError, run_ranks

__all__ = ["RankError", "run_ranks", "write_tiny_model"]
