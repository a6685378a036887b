"""The page as text, and as a real browser draws it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench import page
from bench.page import Column, Dot, Group, Value
from tests.browser import View, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LONG = "qwen3-coder-30b-a3b-instruct-q4_k_m-with-a-name-that-does-not-end-soon"
UNBROKEN = "W" * 90
GROUPS = [
    Group(LONG, [Value(60, 58, 62), Value(90, 85, 95)]),
    Group("nothing and none", [Value(0), None]),
    Group(UNBROKEN, [Value(30), "unsupported: this file has no head that could draft a token"]),
    Group("<b>&amp;</b>", [Value(-12.5, -15, -10), Value(5, 5, 5)]),
    Group("模型" * 20, [Value(math.nan), Value(1e-9)]),
]
DOTS = [
    Dot(LONG, Value(1.42, 1.38, 1.46, "1.42x [1.38, 1.46]")),
    Dot("worse", Value(0.93, 0.9, 0.96)),
    Dot("neither", Value(1.01, 0.97, 1.05)),
    Dot(UNBROKEN, None),
    Dot("below zero", Value(-0.5, -0.75, -0.25)),
]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 90, [0, 20, 40, 60, 80, 100]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-12.5, 95, [-20, 0, 20, 40, 60, 80, 100]),
        (3, 3, [2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6]),
        (0, 1e-9, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9]),
        (0, 123456, [0, 25000, 50000, 75000, 100000, 125000]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert page.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.2345, "1.23"),
        (41.87, "41.9"),
        (1234.6, "1235"),
        (-3.2, "\u22123.20"),
        (1e-12, "0"),
        (math.inf, page.DASH),
    ],
)
def test_a_number_has_three_digits_that_count(number: float, expected: str) -> None:
    assert page.short(number) == expected


def test_text_is_escaped_wherever_it_stands() -> None:
    bad = '<script>alert("x")</script>'
    whole = page.page(
        bad,
        page.paragraph(bad),
        page.table([Column(bad)], [[bad]], bad),
        page.bars(bad, [bad, bad], [Group(bad, [Value(1, written=bad), bad])], bad),
        page.forest(bad, [Dot(bad, Value(1, 0, 2, bad)), Dot(bad, bad)], 1, bad),
        page.details(bad, page.preformatted(bad)),
        page.tag("p", "x", title=bad),
    )
    assert "<script" not in whole
    assert 'alert("x")' not in whole


def test_a_table_in_markdown_stays_one() -> None:
    rows: list[list[page.Cell]] = [["a|b\nc <x>", 1.5], [None, None]]
    assert page.markdown_table([Column("name"), Column("value", True)], rows) == (
        "| name | value |\n| --- | ---: |\n"
        f"| a\\|b c &lt;x> | 1.50 |\n| {page.DASH} | {page.DASH} |\n"
    )


def sample(folder: Path) -> Path:
    file = folder / "page.html"
    rows: list[list[page.Cell]] = [
        [LONG, 60.0, page.badge("worth it", "good")],
        [UNBROKEN, None, ""],
    ]
    whole = page.page(
        "A page",
        page.table([Column("model"), Column("tok/s", True), Column("verdict")], rows),
        page.bars("Speed", ["off", "on"], GROUPS, "tokens per second"),
        page.forest("Speed-up", DOTS, 1.0, "on / off"),
        page.bars("Nothing", ["a"], []),
        page.bars("Zeros", ["a"], [Group("z", [Value(0)])]),
        page.forest("Equal", [Dot("one", Value(1.0, 1.0, 1.0))], 1.0),
        page.preformatted(UNBROKEN * 3),
    )
    file.write_text(whole, encoding="utf-8")
    return file


def widths(view: View) -> list[tuple[float, float]]:
    """Of each bar of the first chart: the value it shows, and its width in pixels."""
    script = (
        "[...document.querySelector('svg').querySelectorAll('.bar')]"
        ".map(bar => [+bar.dataset.value, bar.getBoundingClientRect().width])"
    )
    found: list[tuple[float, float]] = view.page.evaluate(script)
    return found


@pytest.mark.parametrize("width", [1100, 420])
def test_every_word_can_be_read_and_nothing_is_loaded(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    with opened(browser, sample(tmp_path), width=width) as view:
        assert view.collisions() == []
        assert not view.is_scrolled_sideways()
        assert (view.complaints, view.requests) == ([], [])


def test_bars_are_as_long_as_their_values(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, sample(tmp_path)) as view:
        drawn = widths(view)
        assert len(drawn) == 7
        scale = drawn[0][1] / drawn[0][0]
        for value, width in drawn:
            assert width == pytest.approx(abs(value) * scale, abs=0.5)
        zero = view.page.locator(".rule.zero").first.bounding_box()
        below = view.page.locator('.bar[data-value="-12.5"]').bounding_box()
        assert zero is not None
        assert below is not None
        assert below["x"] + below["width"] == pytest.approx(zero["x"], abs=1)


def test_an_interval_has_the_colour_of_its_side(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, sample(tmp_path)) as view:
        sides = view.page.evaluate(
            "[...document.querySelectorAll('svg')[1].querySelectorAll('.dot')]"
            ".map(dot => dot.parentNode.getAttribute('class'))"
        )
        assert sides == ["good", "bad", "neutral", "bad"]
        ends = view.page.evaluate(
            "[...document.querySelectorAll('svg')[1].querySelectorAll('.whisker:not(.under)')]"
            ".map(w => w.getBoundingClientRect()).map(box => [box.left, box.right])"
        )
        centres = view.page.evaluate(
            "[...document.querySelectorAll('svg')[1].querySelectorAll('.dot')]"
            ".map(w => w.getBoundingClientRect()).map(box => (box.left + box.right) / 2)"
        )
        for (left, right), centre in zip(ends, centres, strict=True):
            assert (left + right) / 2 == pytest.approx(centre, abs=1.5)


def test_a_dark_setting_gives_a_dark_page(browser: Browser, tmp_path: Path) -> None:
    colours = []
    for is_dark in (False, True):
        with opened(browser, sample(tmp_path), is_dark=is_dark) as view:
            colours.append(view.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
