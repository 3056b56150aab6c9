"""Where Megatron-Core runs when there is no GPU."""

from slimtron_common.backend.cpu import cpu_backend, cpu_backend_active

__all__ = ["cpu_backend", "cpu_backend_active"]
