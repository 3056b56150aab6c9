"""Losses on hidden states, on every pipeline stage."""

from slimtron_distill.hidden.losses import cosine_loss, mse_loss
from slimtron_distill.hidden.match import HiddenMatch
from slimtron_distill.hidden.pairs import gradient_scale, match_pairs

__all__ = ["HiddenMatch", "cosine_loss", "gradient_scale", "match_pairs", "mse_loss"]
