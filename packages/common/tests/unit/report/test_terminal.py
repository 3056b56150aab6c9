from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from slimtron_common.report import Column, Comparison, print_comparison


def printed(comparison: Comparison, *, width: int = 80, color: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=color, color_system="standard" if color else None
    )
    print_comparison(comparison, console)
    return file.getvalue()


def test_shows_every_number_within_80_columns(comparison: Comparison) -> None:
    text = printed(comparison)
    assert max(map(len, text.splitlines())) <= 80
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["SmolLM2-135M, INT4 AWQ"] in rows
    assert ["original", "quantized (in memory)", "exported (reloaded)"] in rows
    assert ["Weights", "256.6 MiB", "107.6 MiB", "-58.0%", "107.6 MiB", "-58.0%"] in rows
    assert ["Perplexity", "14.004", "15.731", "+12.3%", "inf", "-"] in rows
    assert ["KL divergence (nats)", "n/a", "0.08231", "-", "nan", "-"] in rows
    assert ["Speed (tokens/s)", "n/a", "n/a", "-", "1,200", "-"] in rows


def test_is_plain_in_a_log_and_coloured_on_a_terminal(comparison: Comparison) -> None:
    assert "\x1b" not in printed(comparison)
    coloured = printed(comparison, color=True)
    assert "\x1b[32m-58.0%" in coloured
    assert "\x1b[31m+12.3%" in coloured
    assert "\x1b[1;31minf" in coloured


def test_prints_to_stdout(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(comparison)
    captured = capsys.readouterr()
    assert "256.6 MiB" in captured.out
    assert captured.err == ""


def test_many_models_and_long_names_lose_nothing() -> None:
    names = [f"model-{index}-" + "with_a_very_long_name" * 3 for index in range(7)]
    comparison = Comparison(
        "many",
        tuple(
            Column(name, {"num_parameters": 70_000_000_000 + index, "perplexity": 5.01 + index / 8})
            for index, name in enumerate(names)
        ),
    )
    text = printed(comparison)
    assert max(map(len, text.splitlines())) <= 80
    for index in range(7):
        assert f"{70_000_000_000 + index:,}" in text
        assert f"{5.01 + index / 8:.3f}" in text
    assert "…" not in text


def test_one_model_alone() -> None:
    text = printed(Comparison("alone", (Column("original", {"perplexity": 5.25}),)))
    assert re.search(r"Perplexity +5\.250", text)


def test_names_are_neither_markup_nor_control_codes() -> None:
    text = printed(Comparison("[red]x[/red]\x1b[2J\ud800", (Column("[bold]m", {"[i]k": 1}),)))
    assert "[red]x[/red]?[2J?" in text
    assert "[bold]m" in text
    assert "[i]k" in text
    assert "\x1b" not in text
