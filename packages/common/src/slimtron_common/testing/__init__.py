"""Real processes and small real models for tests."""

from slimtron_common.testing.ranks import run_ranks

__all__ = ["run_ranks"]
