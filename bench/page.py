"""One HTML page that needs nothing else: text, tables and charts, and tables in Markdown.

What is put in as `str` is text and is escaped; `Markup` is what these functions return and
goes in as it is. Charts are SVG inside the page: bars in groups, with whiskers, and a
forest plot. Colours follow the reader's light or dark setting. The page forbids its own
browser to load anything, and to run any script but the one it was made with, if any.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

CHART_WIDTH = 860
LABEL_LEAST = 60.0
LABEL_MOST = 260.0  # widths are of SVG's own units, one pixel each where the page is wide
PAD = 12
CHAR_WIDTH = 8.3  # at 13 px, of DejaVu Sans: other fonts that a browser may take are narrower
CHAR_WIDTHS = {
    **dict.fromkeys("ijl.,:;'|!", 5.0),
    **dict.fromkeys("()[]tfr-/ ", 5.5),
    **dict.fromkeys("ABCDEFGHIJKLNOPQRSTUVXYZ+=<>\u2212", 10.9),
    **dict.fromkeys("mwMW@%\u2026", 13.0),
}
WIDE_CHAR_WIDTH = 13.5  # East Asian characters, emoji
LINE_HEIGHT = 17
BAR_HEIGHT = 16
BAR_GAP = 4
ROW_HEIGHT = 30
GROUP_GAP = 18
AXIS_HEIGHT = 42
TICKS_ABOUT = 6
TICK_SPACE = 54
DASH = "–"  # noqa: RUF001 - what stands for a value that is not there
MINUS = "\u2212"
COLOURS = 6


class Markup(str):
    """HTML that may stand in a page as it is."""

    __slots__ = ()


Text = str | Markup
Cell = Text | float | None


@dataclasses.dataclass(frozen=True)
class Column:
    """Of a table. Numbers stand on the right, digit below digit."""

    title: str
    is_number: bool = False


@dataclasses.dataclass(frozen=True)
class Value:
    """A number, its interval if it has one, and how it is written (else by `short`)."""

    value: float
    low: float | None = None
    high: float | None = None
    written: str = ""

    @property
    def text(self) -> str:
        if self.written:
            return self.written
        if self.low is None or self.high is None:
            return short(self.value)
        return f"{short(self.value)} [{short(self.low)}, {short(self.high)}]"

    @property
    def ends(self) -> tuple[float, ...]:
        ends = (self.low, self.value, self.high)
        return tuple(end for end in ends if end is not None and math.isfinite(end))


@dataclasses.dataclass(frozen=True)
class Group:
    """One label of a bar chart and a value for each series; in place of a missing one a
    word may say why it is missing."""

    label: str
    values: Sequence[Value | str | None]


@dataclasses.dataclass(frozen=True)
class Dot:
    """One line of a forest plot. What a test does not show stays without a side's colour."""

    label: str
    value: Value | str | None
    is_shown: bool = True


# --- text


def text(value: Cell) -> Markup:
    """Escaped, unless it is markup; nothing is a dash."""
    if isinstance(value, Markup):
        return value
    if value is None or value == "":
        return Markup(DASH)
    return Markup(html.escape(value if isinstance(value, str) else short(value)))


def short(number: float) -> str:
    """Three digits that count, or all before the point: 0.0123, 1.23, 41.9, 1235."""
    if not math.isfinite(number):
        return DASH
    if number == 0:
        return "0"
    decimals = min(6, max(0, 2 - math.floor(math.log10(abs(number)))))
    written = f"{number:.{decimals}f}"
    return written.replace("-", MINUS) if float(written) else "0"


def tag(name: str, *parts: Text, **attributes: str) -> Markup:
    """An element; `class_` is its attribute class."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{named}>{''.join(_inner(part) for part in parts)}</{name}>")


def _inner(part: Text) -> str:
    return part if isinstance(part, Markup) else html.escape(part)


def heading(words: Text, level: int = 2) -> Markup:
    return tag(f"h{level}", words)


def paragraph(*parts: Text) -> Markup:
    return tag("p", *parts)


def code(words: str) -> Markup:
    return tag("code", words)


def note(*parts: Text, is_warning: bool = False) -> Markup:
    return tag("p", *parts, class_="note warning" if is_warning else "note")


def badge(words: str, kind: str = "neutral") -> Markup:
    """A word in colour; `kind` is good, bad or neutral."""
    return tag("span", words, class_=f"badge {kind}")


def preformatted(words: str) -> Markup:
    """Text as it is, with its line ends; long lines are wrapped."""
    return tag("pre", words)


def details(summary: Text, *parts: Text, is_open: bool = False) -> Markup:
    body = tag("summary", summary) + "".join(_inner(part) for part in parts)
    return Markup(f"<details{' open' if is_open else ''}>{body}</details>")


def side_by_side(*parts: Text) -> Markup:
    """In columns where the window is wide enough."""
    return tag("div", *(tag("div", part) for part in parts), class_="columns")


def page(title: str, *parts: Text, style: str = "", script: str = "") -> str:
    """The whole file, to be written as UTF-8. `style` and `script` are put in as they are."""
    body = "\n".join(_inner(part) for part in parts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f" script-src 'sha256-{digest}';" if script else ""
    script_tag = f"<script>{script}</script>\n" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline';{allowed} img-src data:\">\n"
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main>\n"
        f"{script_tag}</body>\n</html>\n"
    )


# --- tables


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], caption: str = "") -> Markup:
    head = "".join(
        f'<th scope="col"{_number_class(column)}>{text(column.title)}</th>' for column in columns
    )
    body = "".join(f"<tr>{_cells(columns, row)}</tr>\n" for row in rows)
    title = tag("caption", caption) if caption else ""
    return Markup(
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(columns: Sequence[Column], row: Sequence[Cell]) -> str:
    cells = zip(columns, row, strict=True)
    return "".join(f"<td{_number_class(column)}>{text(cell)}</td>" for column, cell in cells)


def _number_class(column: Column) -> str:
    return ' class="number"' if column.is_number else ""


def markdown_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> str:
    """The same in Markdown, ending with a line end."""
    lines = [
        [_markdown_cell(column.title) for column in columns],
        ["---:" if column.is_number else "---" for column in columns],
        *([_markdown_cell(cell) for cell in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(value: Cell) -> str:
    if value is None or value == "":
        return DASH
    written = value if isinstance(value, str) else short(value)
    for plain, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\r", ""), ("\n", " ")):
        written = written.replace(plain, safe)
    return written


# --- charts


def bars(
    title: str,
    series: Sequence[str],
    groups: Sequence[Group],
    unit: str = "",
    *,
    first_colour: int = 0,
) -> Markup:
    """Horizontal bars from zero, one of each series in a group, with whiskers.

    The values stand in a column on the right, where they meet no bar. The series take the
    COLOURS in turn, so that one can look the same in two charts.
    """
    values = [value for group in groups for value in group.values]
    legend = _legend(series, first_colour) if len(series) > 1 else Markup("")
    frame = _Frame.around([group.label for group in groups], values, includes=0.0)
    parts, top = [], 0.0
    for group in groups:
        height = max(
            len(group.values) * (BAR_HEIGHT + BAR_GAP) - BAR_GAP,
            len(frame.lines_of(group.label)) * LINE_HEIGHT,
        )
        parts.append(frame.label(group.label, top + height / 2))
        bars_height = len(group.values) * (BAR_HEIGHT + BAR_GAP) - BAR_GAP
        at = top + (height - bars_height) / 2
        for number, value in enumerate(group.values):
            name = series[number] if number < len(series) else ""
            parts.append(_bar(frame, at, value, first_colour + number, f"{group.label}, {name}"))
            at += BAR_HEIGHT + BAR_GAP
        top += height + GROUP_GAP
    bottom = max(0.0, top - GROUP_GAP) + PAD / 2
    axis = frame.axis(bottom, unit) + frame.rule(0.0, bottom, "zero")
    return _figure(title, legend, frame.svg(title, axis, parts, bottom))


def _bar(frame: _Frame, top: float, value: Value | str | None, number: int, name: str) -> str:
    middle = top + BAR_HEIGHT / 2
    if not isinstance(value, Value):
        return frame.written(value or "no value", middle, is_missing=True)
    if not math.isfinite(value.value):
        return frame.written(value.text, middle, is_missing=True)
    left, right = sorted((frame.x(0.0), frame.x(value.value)))
    hint = html.escape(f"{name}: {value.text}")
    return (
        f'<rect class="bar s{number % COLOURS}" data-value="{value.value:.6g}" x="{left:.2f}" '
        f'y="{top:.2f}" width="{right - left:.2f}" height="{BAR_HEIGHT}">'
        f"<title>{hint}</title></rect>"
        + frame.whisker(value, middle)
        + frame.written(value.text, middle)
    )


def forest(
    title: str,
    dots: Sequence[Dot],
    reference: float | None,
    unit: str = "",
    *,
    is_higher_better: bool = True,
) -> Markup:
    """Dots with intervals beside a line for "no difference".

    One whose interval lies wholly on a side of the line has that side's colour. With no
    reference there is no line, and the axis begins at zero.
    """
    values = [dot.value for dot in dots]
    frame = _Frame.around([dot.label for dot in dots], values, includes=reference or 0.0)
    parts, top = [], 0.0
    for dot in dots:
        height = max(ROW_HEIGHT, len(frame.lines_of(dot.label)) * LINE_HEIGHT + 6)
        middle = top + height / 2
        parts.append(frame.label(dot.label, middle))
        value = dot.value
        if not isinstance(value, Value) or not math.isfinite(value.value):
            words = value.text if isinstance(value, Value) else value or "no value"
            parts.append(frame.written(words, middle, is_missing=True))
        else:
            side = _side(value, reference, is_higher_better) if dot.is_shown else "neutral"
            hint = html.escape(f"{dot.label}: {value.text}")
            parts.append(
                f'<g class="{side}">{frame.whisker(value, middle)}'
                f'<circle class="dot" data-value="{value.value:.6g}" '
                f'cx="{frame.x(value.value):.2f}" cy="{middle:.2f}" r="5.5">'
                f"<title>{hint}</title></circle></g>" + frame.written(value.text, middle)
            )
        top += height
    bottom = top + PAD / 2
    axis = frame.axis(bottom, unit)
    if reference is not None:
        axis += frame.rule(reference, bottom, "reference")
    return _figure(title, Markup(""), frame.svg(title, axis, parts, bottom))


def _side(value: Value, reference: float | None, is_higher_better: bool) -> str:
    if reference is None or value.low is None or value.high is None:
        return "neutral"
    if value.low <= reference <= value.high:
        return "neutral"
    return "good" if (value.low > reference) == is_higher_better else "bad"


def ticks(low: float, high: float, about: int = TICKS_ABOUT) -> list[float]:
    """Round numbers, equally far apart, of which the outer ones enclose low and high."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_text(value: float, step: float) -> str:
    decimals = next((n for n in range(10) if abs(round(step, n) - step) < step * 1e-6), 9)
    written = f"{value:.{decimals}f}"
    return written.replace("-", MINUS) if float(written) else f"{0:.{decimals}f}"


def width_of(words: str) -> float:
    """How broad a text may become in a chart."""
    return sum(
        WIDE_CHAR_WIDTH
        if unicodedata.east_asian_width(char) in "WF"
        else CHAR_WIDTHS.get(char, CHAR_WIDTH)
        for char in words
    )


def wrapped(words: str, room: float) -> list[str]:
    """Lines no broader than `room`, ended at a blank or a hyphen where there is one."""
    lines = [""]
    for piece in re.findall(r"[^\s_/-]*[\s_/-]+|[^\s_/-]+", words):
        if width_of(lines[-1] + piece.rstrip()) <= room:
            lines[-1] += piece
            continue
        if lines[-1]:
            lines.append("")
        for char in piece:
            if lines[-1] and width_of(lines[-1] + char) > room:
                lines.append("")
            lines[-1] += char
    return [line.strip() for line in lines]


def cut(words: str, room: float) -> str:
    """The text, or its beginning and three dots, no broader than `room`."""
    if width_of(words) <= room:
        return words
    while words and width_of(words + "\u2026") > room:
        words = words[:-1]
    return words + "\u2026"


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where things stand in a chart: labels, the plot between `left` and `right`, values."""

    ticks: tuple[float, ...]
    left: float
    right: float

    @classmethod
    def around(
        cls, labels: Sequence[str], values: Sequence[Value | str | None], includes: float
    ) -> _Frame:
        ends = [end for value in values if isinstance(value, Value) for end in value.ends]
        written = [value.text if isinstance(value, Value) else value or "" for value in values]
        label_width = max(map(width_of, labels), default=0.0)
        value_width = max([LABEL_LEAST, *map(width_of, written)])
        left = PAD + min(LABEL_MOST, max(LABEL_LEAST, label_width)) + PAD
        right = CHART_WIDTH - PAD - min(LABEL_MOST, value_width) - PAD
        low, high = min([includes, *ends]), max([includes, *ends])
        if low == high:
            low, high = (low, low + 1) if includes == 0 else (low - 0.5, high + 0.5)
        about = max(2, min(TICKS_ABOUT, int((right - left) / TICK_SPACE)))
        return cls(tuple(ticks(low, high, about)), left, right)

    def x(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        return self.left + (value - first) / (last - first) * (self.right - self.left)

    def lines_of(self, label: str) -> list[str]:
        """A label in lines that fit its column."""
        return wrapped(label, self.left - 2 * PAD)

    def label(self, label: str, middle: float) -> str:
        lines = self.lines_of(label)
        first = middle - (len(lines) - 1) * LINE_HEIGHT / 2
        return "".join(
            f'<text class="label" x="{self.left - PAD:.1f}" '
            f'y="{first + number * LINE_HEIGHT:.2f}">{html.escape(line)}</text>'
            for number, line in enumerate(lines)
        )

    def written(self, words: str, middle: float, *, is_missing: bool = False) -> str:
        """In the column on the right; what does not fit is cut and stands in the hint."""
        shown = cut(words, CHART_WIDTH - 2 * PAD - self.right)
        hint = "" if shown == words else f"<title>{html.escape(words)}</title>"
        kind = "value missing" if is_missing else "value"
        return (
            f'<text class="{kind}" x="{self.right + PAD:.1f}" y="{middle:.2f}">'
            f"{html.escape(shown)}{hint}</text>"
        )

    def whisker(self, value: Value, middle: float) -> str:
        if value.low is None or value.high is None:
            return ""
        if not (math.isfinite(value.low) and math.isfinite(value.high)):
            return ""
        low, high = self.x(value.low), self.x(value.high)
        path = (
            f"M{low:.2f} {middle - 4:.2f}V{middle + 4:.2f}M{low:.2f} {middle:.2f}"
            f"H{high:.2f}M{high:.2f} {middle - 4:.2f}V{middle + 4:.2f}"
        )
        return (
            f'<path class="whisker under" d="{path}"/><path class="whisker" '
            f'data-low="{value.low:.6g}" data-high="{value.high:.6g}" d="{path}"/>'
        )

    def axis(self, bottom: float, unit: str) -> str:
        step = self.ticks[1] - self.ticks[0]
        lines = "".join(
            f'<path class="grid" d="M{self.x(tick):.2f} 0V{bottom:.2f}"/>'
            f'<text class="tick" x="{self.x(tick):.2f}" y="{bottom + 13:.2f}">'
            f"{_tick_text(tick, step)}</text>"
            for tick in self.ticks
        )
        middle = (self.left + self.right) / 2
        name = f'<text class="unit" x="{middle:.1f}" y="{bottom + 32:.2f}">'
        return lines + (f"{name}{html.escape(unit)}</text>" if unit else "")

    def rule(self, value: float, bottom: float, kind: str) -> str:
        return f'<path class="rule {kind}" d="M{self.x(value):.2f} 0V{bottom:.2f}"/>'

    def svg(self, title: str, axis: str, parts: Sequence[str], bottom: float) -> Markup:
        height = bottom + AXIS_HEIGHT
        return Markup(
            f'<svg role="img" aria-label="{html.escape(title)}" '
            f'viewBox="0 {-PAD / 2:g} {CHART_WIDTH} {height + PAD / 2:.1f}">'
            f"{axis}{''.join(parts)}</svg>"
        )


def _legend(series: Sequence[str], first_colour: int) -> Markup:
    entries = (
        tag("span", tag("i", class_=f"key s{number % COLOURS}"), name)
        for number, name in enumerate(series, first_colour)
    )
    return tag("div", *entries, class_="legend")


def _figure(title: str, legend: Markup, chart: Markup) -> Markup:
    caption = tag("figcaption", title)
    return tag("figure", caption, legend, tag("div", chart, class_="scroll"))


STYLE = """
:root {
  --paper: #ffffff; --card: #f7f8fa; --ink: #1b1f24; --soft: #59636e; --line: #dfe3e8;
  --s0: #8a9bb0; --s1: #1f6fd1; --s2: #d9780f; --s3: #14876b; --s4: #8b54c9; --s5: #c2405f;
  --good: #14804a; --bad: #c03434; --good-paper: #e3f4ea; --bad-paper: #fbe7e6;
  --warn: #7a4a00; --warn-paper: #fdf1d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e6e9ed; --soft: #9aa5b1; --line: #333a43;
    --s0: #718096; --s1: #4f9cf5; --s2: #eb9a3e; --s3: #3fb894; --s4: #b18ae6; --s5: #e6738d;
    --good: #56c288; --bad: #f0807c; --good-paper: #17301f; --bad-paper: #3a1d1c;
    --warn: #f2c063; --warn-paper: #33270f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 40px 0 10px; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 8px 0; max-width: 75ch; }
code, pre { font: 13px/1.5 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
code { background: var(--card); padding: 1px 5px; border-radius: 4px; overflow-wrap: anywhere; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0;
}
.note { color: var(--soft); }
.note.warning {
  color: var(--warn); background: var(--warn-paper); border-radius: 8px; padding: 10px 14px;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0; width: 100%; font-size: 14px; }
caption { text-align: left; color: var(--soft); padding: 4px 0; }
th, td { padding: 7px 8px; text-align: left; border-bottom: 1px solid var(--line); }
td { vertical-align: top; overflow-wrap: anywhere; min-width: 7ch; }
td:first-child { min-width: 15ch; }
th { font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
tbody tr:hover { background: var(--card); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.badge {
  display: inline-block; padding: 1px 9px; border-radius: 9px; font-size: 13px;
  font-weight: 600; background: var(--card); color: var(--soft);
}
.badge.good { background: var(--good-paper); color: var(--good); }
.badge.bad { background: var(--bad-paper); color: var(--bad); }
figure {
  margin: 16px 0; padding: 16px 16px 8px; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px;
}
figcaption { font-weight: 600; margin-bottom: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.key { width: 12px; height: 12px; border-radius: 3px; display: inline-block; }
svg { display: block; width: 100%; min-width: 640px; height: auto; margin-top: 10px; }
svg text { font-size: 13px; fill: var(--ink); dominant-baseline: central; }
svg .label { text-anchor: end; }
svg .tick, svg .unit { text-anchor: middle; fill: var(--soft); font-size: 12px; }
svg .value { font-variant-numeric: tabular-nums; }
svg .missing { fill: var(--soft); font-style: italic; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .rule { stroke: var(--soft); stroke-width: 1.5; }
svg .rule.reference { stroke-dasharray: 5 4; }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .whisker.under { stroke: var(--card); stroke-width: 4; opacity: 0.6; }
.bar.s0 { fill: var(--s0); } .bar.s1 { fill: var(--s1); } .bar.s2 { fill: var(--s2); }
.bar.s3 { fill: var(--s3); } .bar.s4 { fill: var(--s4); } .bar.s5 { fill: var(--s5); }
.key.s0 { background: var(--s0); } .key.s1 { background: var(--s1); }
.key.s2 { background: var(--s2); } .key.s3 { background: var(--s3); }
.key.s4 { background: var(--s4); } .key.s5 { background: var(--s5); }
svg .dot { fill: var(--soft); stroke: var(--card); stroke-width: 1.5; }
svg .good .dot { fill: var(--good); } svg .bad .dot { fill: var(--bad); }
svg .good .whisker:not(.under) { stroke: var(--good); }
svg .bad .whisker:not(.under) { stroke: var(--bad); }
.columns { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.columns > div { min-width: 0; }
details { margin: 10px 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
summary { cursor: pointer; font-weight: 600; }
@media print { figure, table { break-inside: avoid; } }
"""
