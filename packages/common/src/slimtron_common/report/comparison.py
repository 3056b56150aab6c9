"""What a report says: models side by side, plots, tables and facts, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

from slimtron_common.errors import ConfigError

__all__ = [
    "STANDARD_METRICS",
    "Cell",
    "Column",
    "Comparison",
    "Metric",
    "Number",
    "Plot",
    "Table",
]

Number: TypeAlias = float | int | None
"""A measured value; None where it was not measured."""

Cell: TypeAlias = str | bool | float | int | None


@dataclass(frozen=True)
class Metric:
    """How one measured quantity is named, shown and judged."""

    key: str
    """Its name in `Column.metrics`."""

    label: str
    """Its name for the reader."""

    unit: str = ""

    better: Literal["lower", "higher"] | None = None
    """Which direction is an improvement; None where a change is neither."""

    format: Literal["number", "count", "bytes", "fraction"] = "number"
    """``fraction`` shows 0..1 as per cent, ``bytes`` picks a binary unit, ``count`` an integer."""

    headline: bool = False
    """Whether it is one of the few numbers at the head of the page."""


STANDARD_METRICS = (
    Metric("weight_bytes", "Weights", better="lower", format="bytes", headline=True),
    Metric("checkpoint_bytes", "Checkpoint on disk", better="lower", format="bytes"),
    Metric("num_parameters", "Parameters", format="count"),
    Metric("bits_per_weight", "Bits per weight", better="lower", headline=True),
    Metric("perplexity", "Perplexity", better="lower", headline=True),
    Metric("loss", "Mean loss", unit="nats", better="lower"),
    Metric("kl", "KL divergence", unit="nats", better="lower", headline=True),
    Metric("agreement", "Top-1 agreement", better="higher", format="fraction", headline=True),
    Metric("num_tokens", "Tokens evaluated", format="count"),
)
"""The quantities that every Slimtron report knows, in the order in which they are shown."""


@dataclass(frozen=True)
class Column:
    """One model's measurements."""

    name: str
    metrics: dict[str, Number]


@dataclass(frozen=True)
class Plot:
    """One diagram."""

    title: str

    kind: Literal["bar", "line", "histogram"]

    x: tuple[str, ...] | tuple[float | int, ...]
    """Positions or names of the points or bars; for a histogram the ``n + 1`` edges of its bins."""

    series: Mapping[str, tuple[Number, ...]]
    """Values by name, one per entry of ``x``; for a histogram the ``n`` counts."""

    x_label: str = ""
    y_label: str = ""
    log_y: bool = False
    log_x: bool = False

    note: str = ""
    """A sentence below the diagram."""

    def __post_init__(self) -> None:
        where = f"plot {self.title!r}"
        length = len(self.x)
        if self.kind == "histogram":
            edges = [edge for edge in self.x if not isinstance(edge, str)]
            is_increasing = all(a < b for a, b in pairwise(edges))
            if len(edges) != length or length < 2 or not is_increasing:
                raise ConfigError("the edges of a histogram must be increasing", where=where)
            if self.log_x and edges[0] <= 0:
                raise ConfigError("edges on a logarithmic axis must be positive", where=where)
            length -= 1
        for name, values in self.series.items():
            if len(values) != length:
                raise ConfigError(
                    f"series {name!r} does not fit the x axis",
                    where=where,
                    found=f"{len(values)} values",
                    allowed=length,
                )

    @classmethod
    def histogram(
        cls,
        title: str,
        samples: Mapping[str, Sequence[float]],
        *,
        num_bins: int = 40,
        x_label: str = "",
        y_label: str = "",
        log_x: bool = False,
        log_y: bool = False,
    ) -> Plot:
        """Counts samples into bins shared by all series.

        Args:
            title: The diagram's title.
            samples: Values by the name of their series.
            num_bins: How many bins.
            x_label: What the values are.
            y_label: What is counted.
            log_x: Whether the bins are equally wide in the logarithm.
            log_y: Whether the counts are shown on a logarithmic axis.

        Returns:
            The plot. Its note tells how many values it cannot show: those that are not finite
            and, with ``log_x``, those that are not positive.
        """
        import numpy as np

        arrays = {name: np.asarray(values, dtype=np.float64) for name, values in samples.items()}
        shown = {
            name: values[np.isfinite(values) & ((values > 0) | (not log_x))]
            for name, values in arrays.items()
        }
        total = sum(values.size for values in arrays.values())
        everything = np.concatenate([np.empty(0), *shown.values()])
        low, high = (1.0, 1.0) if everything.size == 0 else (everything.min(), everything.max())
        if low == high:
            # One value has no range of its own.
            low, high = (low / 2, high * 2) if log_x else (low - 0.5, high + 0.5)
        edges = (np.geomspace if log_x else np.linspace)(low, high, num_bins + 1)
        # geomspace rounds its ends; the extremes must not fall out of the bins.
        edges[0], edges[-1] = low, high
        note = ""
        if everything.size < total:
            reason = "zero, negative or not finite" if log_x else "not finite"
            note = f"{total - everything.size} of {total} values are {reason} and not shown."
        return cls(
            title,
            "histogram",
            tuple(edges.tolist()),
            {
                name: tuple(np.histogram(values, bins=edges)[0].tolist())
                for name, values in shown.items()
            },
            x_label=x_label,
            y_label=y_label,
            log_x=log_x,
            log_y=log_y,
            note=note,
        )


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ConfigError(
                    f"row {number} does not fit the header",
                    where=f"table {self.title!r}",
                    found=f"{len(row)} cells",
                    allowed=len(self.header),
                )


@dataclass(frozen=True)
class Comparison:
    """A whole report. The first column is what the others are compared with."""

    title: str

    columns: tuple[Column, ...]

    plots: tuple[Plot, ...] = ()

    tables: tuple[Table, ...] = ()

    facts: dict[str, str] = field(default_factory=dict)
    """What a reader needs in order to repeat the measurement: versions, configuration, data."""

    metrics: tuple[Metric, ...] = ()
    """Descriptions beyond `STANDARD_METRICS`, or in place of one with the same key."""

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                "a comparison needs columns with different names",
                where=f"report {self.title!r}",
                found=names,
            )

    def rows(self) -> tuple[Metric, ...]:
        """Descriptions of all metrics that any column has, in the order in which to show them."""
        described = {metric.key: metric for metric in (*STANDARD_METRICS, *self.metrics)}
        present = {key: None for column in self.columns for key in column.metrics}
        known = [metric for key, metric in described.items() if key in present]
        return (*known, *(Metric(key, key) for key in present if key not in described))
