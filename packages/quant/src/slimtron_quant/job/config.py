"""The settings of a quantization job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slimtron_common.errors import ConfigError
from slimtron_common.evaluation.config import EvaluationConfig
from slimtron_common.evaluation.gate import QualityGate
from slimtron_common.parallel.config import ParallelConfig
from slimtron_quant.config import ExportConfig, QuantizationConfig
from slimtron_quant.mixed.config import MixedPrecisionConfig

__all__ = ["QuantJobConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantJobConfig:
    """One job: which model, to what, proved how, written where."""

    model: str
    """``hf:DIR``, ``megatron:DIR`` or ``nemo2:DIR``."""

    export: ExportConfig
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    mixed: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    """With a budget, the candidates stand in the place of ``quantization.algorithm``."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: QualityGate = field(default_factory=QualityGate)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    layerwise: bool = False
    """Whether one layer at a time is in memory, for models that do not fit: each is read from the
    checkpoint when its turn comes, and hidden states wait on disk. The numbers are the same."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the model computes in; ``auto``: as stored on a GPU, float32 on the CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    seed: int = 1234
    """Seeds the order of the text and everything random."""

    trust_remote_code: bool = False
    """Whether the tokenizer may run code that comes with the model."""

    def __post_init__(self) -> None:
        if self.quantization.algorithm is None and not self.quantization.enable_kv_cache:
            raise ConfigError(
                "without a recipe there is nothing to quantize",
                where="quantization.algorithm",
                found=None,
                hint="`slimtron-quant recipes` lists them; enable_kv_cache quantizes the KV cache "
                "alone; `slimtron-common convert` exports a model as it is",
            )
        if self.mixed.is_on:
            self._check_mixed()

    def _check_mixed(self) -> None:
        default = QuantizationConfig()
        for name, hint in (
            ("algorithm", "say --candidates, and leave --recipe out"),
            ("overrides", "`exclude` leaves layers as they are"),
        ):
            found = getattr(self.quantization, name)
            if found != getattr(default, name):
                raise ConfigError(
                    "with a budget, every layer's recipe is chosen from the candidates",
                    where=f"quantization.{name}",
                    found=found,
                    hint=hint,
                )

    @property
    def output(self) -> Path:
        """The directory that the job writes."""
        return self.export.path
