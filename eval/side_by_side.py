"""An A/B comparison to be read: one HTML page, prompts down and contestants across, or Markdown.

The page works from a file: filters and word differences are a script inside of it, the only
one that it lets its browser run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import page
from bench.page import Column, Dot, Markup, Value, badge, tag
from eval import judge, stats
from eval.checks import Finding
from eval.comparison import TRUNCATED, Answered, Comparison, Duel, Ranking, Side, same_replies
from eval.roles import Prompt

TITLE = "Replies side by side"
MARKS = {"passed": "\u2713", "failed": "\u2717", "skipped": "\u2013"}


def page_of(found: Comparison) -> str:
    """The whole file."""
    return page.page(
        TITLE,
        page.paragraph(_lead(found)),
        *(page.note(note, is_warning=True) for note in found.notes),
        page.heading("Contestants"),
        page.table(SIDE_COLUMNS, _side_rows(found)),
        *(page.note(line) for line in same_replies(found)),
        *(part for ranking in found.rankings for part in _ranking(ranking, found)),
        page.heading("Replies"),
        _toolbar(found),
        _board(found),
        style=_resource("side_by_side.css"),
        script=_resource("side_by_side.js"),
    )


def markdown_of(found: Comparison) -> str:
    parts = [f"# {TITLE}\n", f"{_lead(found)}\n"]
    parts += [f"> {note}\n" for note in found.notes]
    parts.append(page.markdown_table(SIDE_COLUMNS, _side_rows(found)))
    parts += [f"{line}\n" for line in same_replies(found)]
    for ranking in found.rankings:
        parts += [f"## {ranking.source}\n", f"{ranking.note}\n"]
        if not ranking.games:
            continue
        parts.append(page.markdown_table(RATING_COLUMNS, _rating_rows(ranking, found)))
        parts.append("".join(f"- {line}\n" for line in _duel_lines(ranking, found)))
    columns = [Column("prompt"), *(Column(name, is_number=True) for name in _names(found))]
    parts += ["## Checks passed\n", page.markdown_table(columns, _check_rows(found))]
    return "\n".join(parts)


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _lead(found: Comparison) -> str:
    return (
        f"{len(found.prompts)} prompts, one for each role of an agent, "
        f"{len(found.sides)} contestants. So few prompts tell large differences from none, and "
        "little in between: look at the intervals, and read the replies."
    )


def _names(found: Comparison) -> list[str]:
    return [str(side.contestant) for side in found.sides]


# --- numbers

SIDE_COLUMNS = [
    Column("contestant"),
    Column("replies", is_number=True),
    Column("checks passed", is_number=True),
    Column("prompts without a fault", is_number=True),
    Column("cut off", is_number=True),
    Column("empty", is_number=True),
    Column("errors", is_number=True),
    Column("tokens", is_number=True),
    Column("median tok/s", is_number=True),
    Column("median s a reply", is_number=True),
]


def _side_rows(found: Comparison) -> list[list[page.Cell]]:
    rows: list[list[page.Cell]] = []
    for side in found.sides:
        row: list[page.Cell] = [
            str(side.contestant),
            f"{len(side.answers)} of {len(found.prompts)}",
            judge.share(side.passed, side.judged),
            f"{side.perfect} of {len(side.answers)}",
            str(side.count(TRUNCATED)),
            str(side.count("empty")),
            str(side.errors),
            str(side.tokens),
            side.median_tokens_per_s,
            side.median_wall_s,
        ]
        rows.append(row)
    return rows


RATING_COLUMNS = [
    Column("contestant"),
    Column("rating", is_number=True),
    Column("95 % interval", is_number=True),
    Column("won", is_number=True),
    Column("tied", is_number=True),
    Column("lost", is_number=True),
]


def _rating_rows(ranking: Ranking, found: Comparison) -> list[list[page.Cell]]:
    names = _by_slug(found)
    return [
        [
            names[rating.contestant],
            f"{rating.elo:.0f}",
            f"{rating.interval.low:.0f} to {rating.interval.high:.0f}",
            str(rating.wins),
            str(rating.ties),
            str(rating.losses),
        ]
        for rating in ranking.ratings
    ]


def _by_slug(found: Comparison) -> dict[str, str]:
    return {side.slug: str(side.contestant) for side in found.sides}


def _ranking(ranking: Ranking, found: Comparison) -> list[Markup]:
    if not ranking.games:
        return [page.heading(ranking.source), page.note(ranking.note)]
    names = _by_slug(found)
    dots = [
        Dot(
            names[rating.contestant],
            Value(
                rating.elo,
                rating.interval.low,
                rating.interval.high,
                f"{rating.elo:.0f} [{rating.interval.low:.0f}, {rating.interval.high:.0f}]",
            ),
            is_shown=any(
                duel.is_shown and rating.contestant in (duel.first, duel.second)
                for duel in ranking.duels
            ),
        )
        for rating in ranking.ratings
    ]
    lines = [tag("li", line) for line in _duel_lines(ranking, found)]
    return [
        page.heading(ranking.source),
        page.paragraph(ranking.note),
        page.forest(
            "Bradley-Terry rating with 95 % intervals, from drawing prompts again",
            dots,
            1000.0,
            "points; 1000 is the mean, 400 points are odds of ten to one",
        ),
        tag("ul", *lines, class_="duels"),
        page.details("As a table", page.table(RATING_COLUMNS, _rating_rows(ranking, found))),
    ]


def _duel_lines(ranking: Ranking, found: Comparison) -> list[str]:
    names = _by_slug(found)
    return [_duel_line(duel, names[duel.first], names[duel.second]) for duel in ranking.duels]


def _duel_line(duel: Duel, first: str, second: str) -> str:
    """A difference is called one only where the corrected test shows it."""
    won, lost = duel.wins, duel.losses
    is_turned = duel.is_shown and lost > won
    if is_turned:
        first, second, won, lost = second, first, lost, won
    said = "is ahead of" if duel.is_shown else "shows no difference from"
    p = stats.p_in_words(duel.p_holm)
    return f"{first} {said} {second}: {won} won, {duel.ties} tied, {lost} lost; {p}"


def _check_rows(found: Comparison) -> list[list[page.Cell]]:
    rows: list[list[page.Cell]] = []
    for prompt in found.prompts:
        answers = [side.answers.get(prompt.id) for side in found.sides]
        rows.append([prompt.role, *(_score(answer) for answer in answers)])
    return rows


def _score(answer: Answered | None) -> str:
    return f"{answer.passed} of {answer.passed + answer.failed}" if answer else ""


# --- replies


def _toolbar(found: Comparison) -> Markup:
    """Without a script all of it does nothing, so the script shows it."""
    everyone = [(str(number), name) for number, name in enumerate(_names(found))]
    roles = [(prompt.id, prompt.role) for prompt in found.prompts]
    states = [("", "all prompts"), ("failed", "with a failed check"), ("apart", "checks differ")]
    boxes = [
        tag(
            "label",
            Markup(f'<input type="checkbox" class="side" value="{number}" checked>'),
            name,
        )
        for number, name in everyone
    ]
    first = tag(
        "div",
        _labelled("Role", _select("role", [("", "every role"), *roles])),
        _labelled("Show", _select("state", states)),
        _labelled("Find", Markup('<input type="search" id="find" placeholder="words in a reply">')),
        tag("output", "", id="count"),
        class_="tools",
    )
    second = tag(
        "div",
        _labelled("Words that differ: from", _select("from", [("", "\u2026"), *everyone])),
        _labelled("to", _select("to", [("", "\u2026"), *everyone])),
        tag("button", "Clear", id="clear", type="button"),
        class_="tools",
    )
    third = tag("fieldset", tag("legend", "Contestants"), *boxes, class_="tools sides")
    return tag("form", first, second, third, id="toolbar", hidden="")


def _labelled(name: str, field: Markup) -> Markup:
    return tag("label", tag("span", name), field)


def _select(name: str, options: Sequence[tuple[str, str]]) -> Markup:
    return tag("select", *(tag("option", words, value=value) for value, words in options), id=name)


def _board(found: Comparison) -> Markup:
    rows = [_row(prompt, found.sides) for prompt in found.prompts]
    nothing = tag("p", "No prompt is left: change the filter.", id="nothing", hidden="")
    return tag("div", *rows, nothing, id="board", style=f"--sides: {max(1, len(found.sides))}")


def _row(prompt: Prompt, sides: Sequence[Side]) -> Markup:
    answers = [side.answers.get(prompt.id) for side in sides]
    cards = [
        _card(number, str(side.contestant), answer)
        for number, (side, answer) in enumerate(zip(sides, answers, strict=True))
    ]
    tools = [
        f"{tool['function']['name']}: {tool['function'].get('description', '')}"
        for tool in prompt.tools
    ]
    asked = "\n\n".join([prompt.system, prompt.user, *tools])
    return tag(
        "section",
        tag("h3", badge(prompt.role), " ", prompt.title),
        page.details("What was asked", page.preformatted(asked)),
        tag("div", *cards, class_="cards"),
        class_="prompt",
        data_role=prompt.id,
    )


def _card(number: int, name: str, answer: Answered | None) -> Markup:
    if answer is None:
        return tag(
            "article",
            tag("header", tag("b", name), badge("no reply")),
            class_="card",
            data_side=str(number),
            data_failed="0",
            data_passed="",
        )
    marks = [_mark(finding) for finding in answer.findings]
    total = answer.passed + answer.failed
    kind = "bad" if answer.failed else "good"
    parts = [
        tag("header", tag("b", name), badge(f"{answer.passed} of {total}", kind)),
        tag("p", _speed(answer), class_="speed"),
        tag("ul", *marks, class_="marks"),
        tag("pre", answer.text or "(empty)", class_="reply"),
    ]
    if answer.record.get("reasoning"):
        thoughts = page.preformatted(str(answer.record["reasoning"]))
        parts.append(page.details("Its thoughts", thoughts))
    states = ",".join(finding.state for finding in answer.findings)
    return tag(
        "article",
        *parts,
        class_="card",
        data_side=str(number),
        data_failed=str(answer.failed),
        data_passed=states,
    )


def _mark(finding: Finding) -> Markup:
    mark = tag("i", MARKS[finding.state], class_="mark")
    why = tag("small", finding.why) if finding.why else Markup("")
    return tag("li", mark, tag("span", finding.label), why, class_=finding.state)


def _speed(answer: Answered) -> str:
    parts = [
        f"{answer.tokens} tokens" if answer.tokens is not None else "",
        f"{answer.tokens_per_s:.0f} tok/s" if answer.tokens_per_s else "",
        f"{answer.wall_s:.1f} s" if answer.wall_s is not None else "",
    ]
    return "  \u00b7  ".join(part for part in parts if part)
