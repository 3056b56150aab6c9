"""The subcommands of ``slimtron-distill``."""
