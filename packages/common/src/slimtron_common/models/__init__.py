"""What a model is, and how Megatron-Core and Hugging Face each say it."""

from slimtron_common.models.architecture import Architecture

__all__ = ["Architecture"]
