"""The subcommands of ``slimtron-prune``."""
