"""What the processes of tests start with."""

from __future__ import annotations

from slimtron_common.testing import ranks

ranks.PRELOADED += ["slimtron_distill.model.task", "slimtron_distill.training.trainer"]
