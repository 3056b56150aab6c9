"""The text that models are compared on."""

from __future__ import annotations

from dataclasses import dataclass

from slimtron_common.errors import ConfigError

__all__ = ["EvaluationConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out text for perplexity, KL divergence and top-1 agreement."""

    source: str | None = None
    """Text source as in ``data``; without it the calibration's source, before the tokens that
    calibrate, so that the two never overlap."""

    num_tokens: int = 4096
    """Tokens to evaluate on, a multiple of ``seq_length``."""

    seq_length: int = 512
    micro_batch_size: int = 1
    text_field: str = "text"
    """Field of a record that holds the text."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "seq_length", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    "counts tokens or sequences",
                    where=name,
                    found=getattr(self, name),
                    allowed="1 or more",
                )
        if self.seq_length < 2:
            raise ConfigError(
                "a sequence needs a token to predict and one to predict it from",
                where="seq_length",
                found=self.seq_length,
                allowed="2 or more",
            )
        if self.num_tokens % self.seq_length:
            below = self.num_tokens // self.seq_length * self.seq_length
            raise ConfigError(
                "only whole sequences are evaluated",
                where="num_tokens",
                found=self.num_tokens,
                allowed=f"a multiple of seq_length {self.seq_length}, such as "
                f"{below + self.seq_length}",
            )
