from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slimtron_common.report import Column, Comparison, Metric, Plot, Table, write_report
from slimtron_common.report.page import render_page

EVIL = "<script>alert('1')</script>\"&--><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects elements, attributes and text; checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_writes_both_files(tmp_path: Path, comparison: Comparison) -> None:
    page = write_report(tmp_path, comparison)
    assert page == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["slimtron_report"] == 1
    assert content["columns"][0]["metrics"]["perplexity"] == 14.004123
    assert content["columns"][2]["metrics"]["perplexity"] == {"__float__": "inf"}


def test_same_report_same_bytes_in_any_process(tmp_path: Path, comparison: Comparison) -> None:
    write_report(tmp_path, comparison)
    again = tmp_path / "again"
    again.mkdir()
    script = (
        "import sys, pathlib; from slimtron_common.report import *;"
        "write_report(pathlib.Path(sys.argv[2]), read_report(pathlib.Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path), str(again)]
    subprocess.run(command, check=True, env=environment)
    for name in ("report.html", "report.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_importing_the_report_is_light() -> None:
    script = (
        "import sys, slimtron_common.report;"
        "print({'matplotlib', 'numpy', 'pydantic', 'rich', 'torch'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert result.stdout == "set()\n"


def test_page_shows_the_numbers(comparison: Comparison) -> None:
    html = render_page(comparison)
    page = Page(html)
    assert page.count("svg") == 3
    assert page.count("script") == 0
    for text in (
        "107.6 MiB",
        "−58.0%",  # noqa: RUF001 - a minus sign
        "15.731",
        "+12.3%",
        "inf",
        "nan",
        "n/a",
        "88.11%",
        "1,200",
        "int4-awq",
        "Higher is better.",
        "2 values are missing or cannot be drawn on this axis.",
        "1 of 4 values are zero, negative or not finite and not shown.",
        "excluded",
    ):
        assert text in page.texts, text
    assert page.texts.count("inf") == 2  # the card and the table
    broken = [attributes for _, attributes in page.elements if attributes.get("class") == "broken"]
    assert [attributes["title"] for attributes in broken] == ["inf", "nan", "inf", "nan"]


def test_page_fetches_nothing(comparison: Comparison) -> None:
    html = render_page(comparison)
    page = Page(html)
    assert set(re.findall(r'(\S+)="https?://', html)) == {"xmlns", "xmlns:xlink"}
    assert not re.search(r"//(?!www\.w3\.org/)", html)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.elements
    }
    policy = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_element_ids_are_unique(comparison: Comparison) -> None:
    ids = re.findall(r' id="([^"]+)"', render_page(comparison))
    assert len(ids) == len(set(ids))


def test_light_and_dark_define_the_same_colours(comparison: Comparison) -> None:
    html = render_page(comparison)
    light, dark = html.split("(prefers-color-scheme: dark)", 1)
    dark = dark[: dark.index("body {")]
    names = set(re.findall(r"(--[\w-]+):", light))
    assert names == set(re.findall(r"(--[\w-]+):", dark))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= names


def test_everything_is_escaped() -> None:
    comparison = Comparison(
        EVIL,
        (Column(EVIL, {EVIL: 1, "m": 1}), Column(EVIL + "2", {EVIL: 2, "m": 2})),
        (
            Plot(EVIL, "line", (0, 1), {EVIL: (1, 2)}, x_label=EVIL, y_label=EVIL, note=EVIL),
            Plot(EVIL, "bar", (EVIL,), {EVIL: (1,)}),
        ),
        (Table(EVIL, (EVIL,), ((EVIL,),)),),
        {EVIL: EVIL, "broken": "\ud800\x00"},
        (Metric("m", EVIL, unit=EVIL, headline=True),),
    )
    page = Page(render_page(comparison))
    assert page.count("script") == 0
    assert page.count("img") == 0
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    joined = "".join(page.texts)
    assert joined.count(EVIL) >= 14


def test_broken_characters_do_not_stop_the_writing(tmp_path: Path) -> None:
    write_report(tmp_path, Comparison("half \ud800 pair", (Column("a", {}),)))
    assert "half ? pair" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_long_tables_are_folded_and_complete() -> None:
    rows = tuple((f"decoder.layers.{index}.mlp.linear_fc1", 4.5) for index in range(400))
    comparison = Comparison(
        "t",
        (Column("a", {}),),
        tables=(Table("long", ("module", "bits"), rows), Table("short", ("module",), (("x",),))),
    )
    page = Page(render_page(comparison))
    assert [("open" in a) for tag, a in page.elements if tag == "details"] == [False, True]
    assert {row[0] for row in rows} <= set(page.texts)
    assert "400 rows" in page.texts


def test_smallest_report(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, Comparison("", (Column("only", {}),))).read_text())
    assert page.count("svg") == page.count("details") == page.count("dl") == 0


@pytest.mark.parametrize(
    ("key", "before", "after", "widths"),
    [
        ("weight_bytes", 400, 100, [("was", "100.00"), ("is", "25.00")]),
        ("perplexity", 5.0, 20.0, [("was", "25.00"), ("is", "100.00")]),
        ("agreement", None, 0.75, [("is", "75.00")]),
        ("agreement", 1.0, 0.75, [("was", "100.00"), ("is", "75.00")]),
        # There is no scale that a distance from 0 could be drawn to.
        ("kl", 0.0, 0.1, []),
        ("kl", None, 0.1, []),
        ("perplexity", 5.0, math.nan, []),
        ("perplexity", 5.0, math.inf, []),
    ],
)
def test_card_bars_are_to_scale(
    key: str, before: float | None, after: float, widths: list[tuple[str, str]]
) -> None:
    comparison = Comparison("t", (Column("a", {key: before}), Column("b", {key: after})))
    html = render_page(comparison)
    assert re.findall(r'class="(was|is)" style="width:([\d.]+)%"', html) == widths
