"""Whether NeMo 2 can open a quantized checkpoint."""

from __future__ import annotations

from slimtron_common.errors import MissingDependencyError
from slimtron_common.integrations.modelopt import takes_mappings
from slimtron_common.integrations.versions import installed_versions

__all__ = ["check_nemo_opens_quantizers"]


def check_nemo_opens_quantizers() -> None:
    """Refuses to write ModelOpt's quantizers for a NeMo 2 whose ModelOpt could not read them.

    Where NeMo is installed it has the ModelOpt that writes.

    Raises:
        MissingDependencyError: The installed ModelOpt is of a later generation than NeMo's.
    """
    versions = installed_versions(("nemo-toolkit", "nvidia-modelopt"))
    if "nemo-toolkit" not in versions and not takes_mappings():
        raise MissingDependencyError(
            "quantizers are ModelOpt's own, and NeMo 2's ModelOpt is older than the one here",
            where="export.export_format",
            found=f"nemo with nvidia-modelopt {versions['nvidia-modelopt']}",
            allowed="nvidia-modelopt 0.37 to 0.43, or an environment with NeMo 2",
            hint="write megatron, which opens here, or hf for inference engines",
        )
