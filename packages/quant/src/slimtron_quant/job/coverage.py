"""What became of every weight, from the layers' summaries and the files on disk."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from slimtron_common.models import Architecture
from slimtron_common.models.mapping import model_parameters
from slimtron_common.report import Cell, Table
from slimtron_quant.export.kinds import Export
from slimtron_quant.summary import LayerSummary

__all__ = ["Coverage", "CoveredModule", "coverage"]

_OTHERS = "norms and biases"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoveredModule:
    """One module of the model as it lies on disk; norms and biases together are one."""

    name: str
    num_parameters: int
    bits: int
    """Stored bits, scales and factors included."""

    summary: LayerSummary | None
    """What the quantization did; None for what it does not look at."""

    reason: str | None
    """Why it stays as it was; None where it is quantized."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return self.bits / self.num_parameters


@dataclass(frozen=True, slots=True)
class Coverage:
    """All of a model's modules."""

    modules: tuple[CoveredModule, ...]

    @property
    def quantized(self) -> list[CoveredModule]:
        """The quantized ones."""
        return [module for module in self.modules if module.reason is None]

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """Stored bits over parameters, of what is quantized; None where nothing is."""
        total = sum(module.num_parameters for module in self.quantized)
        return sum(module.bits for module in self.quantized) / total if total else None

    def facts(self) -> dict[str, str]:
        """A short form for people."""
        everything = sum(module.num_parameters for module in self.modules)
        formats = Counter(m.summary.format for m in self.quantized if m.summary)
        linears = sum(m.summary is not None for m in self.modules)
        share = sum(m.num_parameters for m in self.quantized) / everything
        kept: dict[str, int] = defaultdict(int)
        for module in self.modules:
            if module.reason is not None:
                kept[module.reason] += module.num_parameters
        bits = self.bits_per_quantized_weight
        return {
            "Quantized": f"none of {linears} layers"
            if bits is None
            else ", ".join(f"{n} layers to {name}" for name, n in formats.items())
            + f", of {linears}; {share:.1%} of all parameters, {bits:.2f} bits each",
            "As it was": ", ".join(
                f"{reason} ({count / everything:.1%})" for reason, count in kept.items()
            ),
        }

    def table(self) -> Table:
        """One row for each module."""
        return Table(
            "Layers",
            ("module", "format", "weights", "bits each", "SQNR (dB)", "largest input", "reason"),
            tuple(map(_row, self.modules)),
        )


def coverage(
    architecture: Architecture, layers: Sequence[LayerSummary], exported: Export
) -> Coverage:
    """Joins what was done with what was written.

    Args:
        architecture: The whole model.
        layers: What became of each linear layer.
        exported: The written files.
    """
    summaries = {layer.name: layer for layer in layers}
    parameters: dict[str, int] = defaultdict(int)
    bits: dict[str, int] = defaultdict(int)
    for layer, rule in model_parameters(architecture):
        name = rule.names[0].format(layer=layer, expert=rule.expert)
        is_matrix = len(rule.hf_shapes[0]) > 1
        module = name.removesuffix(".weight") if is_matrix else _OTHERS
        for hf_name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            count = 1
            for size in shape:
                count *= size
            parameters[module] += count
            bits[module] += exported.stored_bits(hf_name)
    return Coverage(
        tuple(
            CoveredModule(
                name=name,
                num_parameters=count,
                bits=bits[name],
                summary=summaries.get(name),
                reason=_reason(name, summaries.get(name)),
            )
            for name, count in parameters.items()
        )
    )


def _row(module: CoveredModule) -> tuple[Cell, ...]:
    done = module.summary
    return (
        module.name,
        (done.format if done else None) or "as it was",
        module.num_parameters,
        round(module.bits_per_weight, 3),
        done.sqnr_db if done else None,
        done.input_amax if done else None,
        module.reason or "",
    )


def _reason(name: str, summary: LayerSummary | None) -> str | None:
    if summary is not None:
        return summary.reason
    if name == _OTHERS:
        return _OTHERS
    kind = name.partition(".")[0].replace("_", " ")
    return "router" if "router" in name else kind
