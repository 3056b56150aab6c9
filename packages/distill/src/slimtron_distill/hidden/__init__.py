"""Losses on hidden states, on every pipeline stage."""

from slimtron_distill.hidden.losses import cosine_loss, mse_loss
from slimtron_distill.hidden.match import HiddenMatch, find_module

__all__ = ["HiddenMatch", "cosine_loss", "find_module", "mse_loss"]
