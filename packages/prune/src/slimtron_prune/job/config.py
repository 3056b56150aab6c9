"""The settings of a pruning job, and of one that only scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slimtron_common.errors import ConfigError
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.gate import QualityGate
from slimtron_common.parallel.config import ParallelConfig
from slimtron_prune.config import PruningConfig
from slimtron_prune.search.config import SearchConfig

__all__ = ["ExportConfig", "ModelJobConfig", "PruneJobConfig", "ScoreJobConfig", "ScoringConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """The text that decides what is important."""

    source: str | None = None
    """``pydoc``, a file (.txt, .jsonl, .json, .parquet), or ``hf:NAME[,CONFIG][:SPLIT]``. Not
    needed for ``drop_layers`` when the evaluation has its own."""

    num_tokens: int = 65536
    """Tokens to score on, a multiple of ``seq_length``. Minitron took 1024 sequences."""

    seq_length: int = 512
    micro_batch_size: int = 1
    text_field: str = "text"
    """Field of a record that holds the text."""

    def __post_init__(self) -> None:
        # The same rules: whole sequences of two tokens or more.
        EvaluationConfig(
            num_tokens=self.num_tokens,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What is written, and where."""

    path: Path
    """Directory to write."""

    export_format: Literal["hf", "megatron", "nemo"] = "hf"
    """A Hugging Face directory, a Megatron distributed checkpoint or one of NeMo 2."""

    check_transformers: bool = True
    """Whether transformers loads the result, too, and must compute the same logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelJobConfig:
    """Which model, and how it is computed."""

    model: str
    """``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the model computes in; ``auto``: as stored on a GPU, float32 on the CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    seed: int = 1234
    """Seeds the order of the text and everything random."""

    trust_remote_code: bool = False
    """Whether the tokenizer may run code that comes with the model."""

    scoring: ScoringConfig = field(default_factory=ScoringConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJobConfig(ModelJobConfig):
    """Scores of one model, to cut any number of smaller ones by."""

    path: Path
    """Directory to write."""

    def __post_init__(self) -> None:
        if self.scoring.source is None:
            raise ConfigError("scores need a text", where="scoring.source", hint="give --data")


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneJobConfig(ModelJobConfig):
    """One job: which model, to what, proved how, written where."""

    export: ExportConfig
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """Sizes to prune to, or the layers to drop."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """A budget, for which the sizes are searched."""

    scores: Path | None = None
    """What ``slimtron-prune score`` wrote; without it the model is scored first."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: QualityGate = field(default_factory=QualityGate)

    def __post_init__(self) -> None:
        if self.pruning.is_empty and not self.search.has_budget:
            raise ConfigError(
                "there is nothing to prune to",
                where="pruning",
                hint="set a size such as --ffn-hidden-size, --drop-layers, or a budget such as "
                "--target-params 100M",
            )
        if not self.pruning.is_empty and self.search.has_budget:
            raise ConfigError(
                "a budget leaves the sizes to the search",
                where="search",
                found=", ".join(self.pruning.targets) or "drop_layers",
                allowed="sizes or a budget",
                hint="search.bounds keeps a dimension at a size: --bound num_layers=26:26",
            )
        if self.text is None or (self.uses_scoring_text and self.scoring.source is None):
            raise ConfigError(
                "there is no text to score or evaluate on",
                where="scoring.source",
                hint="give --data",
            )

    @property
    def needs_scores(self) -> bool:
        """Whether anything is chosen by importance."""
        return self.pruning.drop_layers is None

    @property
    def collects_scores(self) -> bool:
        """Whether the job has to score the model itself."""
        return self.needs_scores and self.scores is None

    @property
    def uses_scoring_text(self) -> bool:
        """Whether the job scores the model or measures candidates."""
        return self.collects_scores or self.search.has_budget

    @property
    def text(self) -> str | None:
        """The text to evaluate on."""
        return self.evaluation.source or self.scoring.source
