"""Models before and after, side by side: in the terminal, as JSON and as a page."""

from slimtron_common.report.comparison import (
    STANDARD_METRICS,
    Cell,
    Column,
    Comparison,
    Metric,
    Number,
    Plot,
    Table,
)
from slimtron_common.report.load import read_report
from slimtron_common.report.terminal import print_comparison
from slimtron_common.report.write import write_report

__all__ = [
    "STANDARD_METRICS",
    "Cell",
    "Column",
    "Comparison",
    "Metric",
    "Number",
    "Plot",
    "Table",
    "print_comparison",
    "read_report",
    "write_report",
]
