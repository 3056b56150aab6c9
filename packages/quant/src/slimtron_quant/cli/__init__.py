"""The subcommands of ``slimtron-quant``."""
