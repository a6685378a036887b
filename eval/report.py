"""python -m eval.report: what the benchmarks' results come to, and what they do not show.

Contestants are compared question by question, and only where they were asked the same
questions; where the corrected test says nothing, no one is called better.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bench import journal, page
from bench.page import Column, Dot, Markup, Value, tag
from bench.progress import duration
from eval import mmlu, results, stats, tasks
from eval.results import Result, Summary
from eval.task import CORRECT, EMPTY, ERROR, NO_ANSWER, OUTCOMES, TRUNCATED, UNSCORED

TITLE = "Benchmarks"
SHOWN_BELOW = 0.05  # a corrected p value
CHANCE = {"mmlu": 0.25}
TITLES = {"mmlu": "MMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
MANY = 0.1  # so great a share of replies without an answer is said beside the scores
# What makes two runs ask the same; the rest of the settings may differ, which is said.
SAME_QUESTIONS = ("task", "mode", "ids_sha256", "data_sha256", "prompt_version")
MINUS = "\u2212"


@dataclasses.dataclass(frozen=True)
class Run:
    """One contestant on one task. `label` tells it from all others of the report."""

    label: str
    result: Result
    summary: Summary

    @property
    def decides(self) -> dict[str, Any]:
        decides: dict[str, Any] = self.result.header["decides"]
        return decides

    @property
    def questions(self) -> dict[str, Any]:
        """What was asked, apart from how."""
        return {name: self.decides.get(name) for name in SAME_QUESTIONS}

    @property
    def settings(self) -> dict[str, Any]:
        left_out = {*SAME_QUESTIONS, "contestant"}
        return {name: it for name, it in self.decides.items() if name not in left_out}

    @property
    def is_right(self) -> dict[str, bool]:
        """By question, of those that count."""
        return {
            record["id"]: record["outcome"] == CORRECT
            for record in self.result.records
            if record["outcome"] not in (ERROR, UNSCORED)
        }

    @property
    def readings(self) -> tuple[str, ...]:
        """Where replies are read in two ways; the first decides the outcome."""
        return tasks.readings(self.result.task, self.result.mode)

    @property
    def right(self) -> list[int | None]:
        """How many are, by each reading; None by one that an older grader did not know."""
        others = [self.summary.extra.get(name) for name in self.readings[1:]]
        return [self.summary.correct, *others]

    @property
    def read_otherwise(self) -> int:
        """Replies without an answer, to which the flexible reading gives one."""
        return sum(
            record["outcome"] in (NO_ANSWER, TRUNCATED) and bool(record.get("flexible_answer"))
            for record in self.result.records
        )

    @property
    def is_scored(self) -> bool:
        """Not before all programs were run: what is left without one is no fair draw."""
        return bool(self.summary.scored) and not self.summary.unscored

    def rate(self, outcome: str) -> float:
        """Of all replies."""
        replies = self.summary.scored + self.summary.unscored
        return self.summary.outcomes[outcome] / max(1, replies)


@dataclasses.dataclass(frozen=True)
class Duel:
    """Two runs, question by question."""

    first: str
    second: str
    both: int  # questions that both answered
    only_first: int
    only_second: int
    difference: float  # of the shares, first less second
    interval: stats.Interval  # of it, paired bootstrap
    p: float
    p_holm: float

    @property
    def is_shown(self) -> bool:
        return self.p_holm < SHOWN_BELOW

    def sentence(self) -> str:
        p = stats.p_in_words(self.p_holm)
        counts = f"right where the other is not: {self.only_first} and {self.only_second}; {p}"
        if not self.is_shown:
            return f"{self.first} against {self.second}: no difference shown ({counts})"
        is_first = self.only_first > self.only_second
        word = "more" if is_first else "fewer"
        return f"{self.first} got {word} right than {self.second} ({counts})"


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that were asked the same questions, and all their duels."""

    task: str
    title: str
    runs: Sequence[Run]
    duels: Sequence[Duel]
    notes: Sequence[str]

    @property
    def readings(self) -> tuple[str, ...]:
        return self.runs[0].readings


# --- what it comes to


def groups_of(found: Sequence[Result]) -> list[Group]:
    """Tasks in their usual order; runs with other questions are groups of their own."""
    runs = _labelled(found)
    groups = []
    for task in tasks.NAMES:
        by_questions: dict[str, list[Run]] = {}
        for run in runs:
            if run.result.task == task:
                by_questions.setdefault(journal.run_key(run.questions), []).append(run)
        every = list(by_questions.values())
        groups += [_group(task, number, every) for number in range(len(every))]
    return groups


def _labelled(found: Sequence[Result]) -> list[Run]:
    """By contestant, and by folder too where one contestant comes twice to a task."""
    names = [(result.task, result.mode, str(result.contestant)) for result in found]
    runs = []
    for result, name in zip(found, names, strict=True):
        label = name[2] if names.count(name) == 1 else f"{name[2]} ({result.path.parent})"
        runs.append(Run(label, result, results.summary(result)))
    return runs


def _group(task: str, number: int, every: Sequence[Sequence[Run]]) -> Group:
    runs = every[number]
    title = TITLES[task]
    mode = runs[0].result.mode
    if mode != mmlu.CHAT:
        title += f", {mode}"
    notes = []
    if len(every) > 1:
        title += f", questions {number + 1} of {len(every)}"
        notes.append(_why_apart(runs[0], every[0 if number else 1][0]))
    notes += [note for run in runs for note in _notes(run)]
    for run in runs[1:]:
        for difference in journal.differences(runs[0].settings, run.settings):
            notes.append(f"{run.label} was not asked as {runs[0].label} was: {difference}.")
    return Group(task, title, runs, duels(runs), notes)


def _why_apart(run: Run, other: Run) -> str:
    differing = "; ".join(journal.differences(other.questions, run.questions))
    seeds = f"seed {other.decides.get('seed')}, now {run.decides.get('seed')}"
    return (
        "Not compared with the other runs of this task, which were asked other questions, or "
        f"otherwise ({seeds}; {differing})."
    )


def _notes(run: Run) -> list[str]:
    one, notes = run.summary, []
    asked = len(run.result.records)
    if asked < one.questions:
        notes.append(f"{run.label} is not finished: {asked} of {one.questions} questions asked.")
    if one.outcomes[ERROR]:
        notes.append(
            f"{run.label}: {one.outcomes[ERROR]} questions have no reply, for the server failed. "
            "They count neither as right nor as wrong."
        )
    if one.unscored:
        notes.append(
            f"{run.label}: {one.unscored} programs were not run yet, so it has no score: eval.run "
            "with --allow-code-execution runs them."
        )
    for outcome, words in (
        (TRUNCATED, "cut off by the budget of tokens"),
        (NO_ANSWER, "without an answer that could be read"),
        (EMPTY, "empty"),
    ):
        if run.rate(outcome) >= MANY:
            notes.append(
                f"{run.label}: {100 * run.rate(outcome):.0f} % of the replies are {words}, and "
                "count as not right."
            )
    if one.extra and run.read_otherwise:
        notes.append(
            f"{run.label}: read flexibly, {run.read_otherwise} more replies have an answer, and "
            f"{one.extra.get('flexible', 0)} instead of {one.correct} are right."
        )
    if run.readings and one.scored and not one.extra:
        notes.append(
            f"{run.label} was graded in one way only: python -m eval.regrade --write reads its "
            f"replies in both, {' and '.join(run.readings)}."
        )
    graders = sorted({str(it["grader"]) for it in run.result.records if it.get("grader")})
    if len(graders) > 1:
        notes.append(f"{run.label} was graded by {' and '.join(graders)}: python -m eval.regrade.")
    return notes


def duels(runs: Sequence[Run]) -> list[Duel]:
    """Every two, over the questions that both answered; p corrected over all of them."""
    scored = [run for run in runs if run.is_scored]
    counted = [_counted(first, second) for first, second in combinations(scored, 2)]
    corrected = stats.holm([duel.p for duel in counted])
    return [
        dataclasses.replace(duel, p_holm=p_holm)
        for duel, p_holm in zip(counted, corrected, strict=True)
    ]


def _counted(first: Run, second: Run) -> Duel:
    """With p not yet corrected."""
    one, other = first.is_right, second.is_right
    differences = [one[name] - other[name] for name in one if name in other]
    only_first, only_second = differences.count(1), differences.count(-1)
    p = stats.mcnemar(only_first, only_second)
    return Duel(
        first.label,
        second.label,
        len(differences),
        only_first,
        only_second,
        sum(differences) / max(1, len(differences)),
        stats.paired_bootstrap(differences),
        p,
        p,
    )


# --- tables


def score_columns(readings: Sequence[str]) -> list[Column]:
    scores = [Column(f"right ({name})", True) for name in readings]
    scores = scores or [Column("right", True)]
    return [
        Column("contestant"),
        Column("scored", is_number=True),
        *scores,
        Column("cut off", is_number=True),
        Column("no answer", is_number=True),
        Column("empty", is_number=True),
        Column("tokens", is_number=True),
        Column("tokens a reply", is_number=True),
        Column("time", is_number=True),
    ]


def score_row(run: Run) -> list[page.Cell]:
    one = run.summary
    return [
        run.label,
        f"{one.scored} of {one.questions}",
        *("" if count is None else percent(count, one.scored) for count in _scored(run)),
        *(f"{100 * run.rate(name):.0f} %" for name in (TRUNCATED, NO_ANSWER, EMPTY)),
        str(one.predicted_n),
        one.predicted_n / max(1, one.scored + one.unscored),
        duration(one.wall_s),
    ]


def _scored(run: Run) -> list[int | None]:
    return run.right if run.is_scored else [None for _ in run.right]


def percent(count: int, total: int) -> str:
    """24.0 % [14.3, 37.4]."""
    interval = stats.wilson(count, total)
    return f"{100 * count / total:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


OUTCOME_COLUMNS = [
    Column("contestant"),
    *(Column(name.replace("_", " "), is_number=True) for name in OUTCOMES),
    Column("not run yet", is_number=True),
]


def outcome_row(run: Run) -> list[page.Cell]:
    counts = [run.summary.outcomes[name] for name in OUTCOMES]
    return [run.label, *map(str, counts), str(run.summary.unscored)]


DUEL_COLUMNS = [
    Column("first"),
    Column("second"),
    Column("questions", is_number=True),
    Column("only first", is_number=True),
    Column("only second", is_number=True),
    Column("difference", is_number=True),
    Column("p", is_number=True),
    Column("p (Holm)", is_number=True),
    Column("shown?"),
]


def duel_row(duel: Duel) -> list[page.Cell]:
    return [
        duel.first,
        duel.second,
        str(duel.both),
        str(duel.only_first),
        str(duel.only_second),
        f"{points(duel.difference)} [{points(duel.interval.low)}, {points(duel.interval.high)}]",
        f"{duel.p:.3f}",
        f"{duel.p_holm:.3f}",
        "yes" if duel.is_shown else "no difference shown",
    ]


def points(share: float) -> str:
    """Percentage points: +4.0."""
    return f"{100 * share:+.1f}".replace("-", MINUS).replace("+0.0", "0.0")


# --- page and Markdown

HOW_TO_READ = (
    "Intervals hold 95 %: Wilson's for a score, paired bootstrap for a difference. Two "
    "contestants are compared by the exact McNemar test on the questions that only one of them "
    "got right, and p is corrected (Holm) for the number of comparisons. Where it says no "
    "difference shown, an order by score is no finding."
)


def page_of(groups: Sequence[Group]) -> str:
    parts: list[page.Text] = [page.paragraph(HOW_TO_READ)]
    for group in groups:
        parts += _group_parts(group)
    return page.page(TITLE, *parts)


def _group_parts(group: Group) -> list[Markup]:
    parts = [page.heading(group.title)]
    parts += [page.note(note, is_warning=True) for note in group.notes]
    parts.append(page.table(score_columns(group.readings), map(score_row, group.runs)))
    parts.append(_scores_chart(group))
    if group.duels:
        parts.append(_duels_chart(group))
        parts.append(tag("ul", *(tag("li", duel.sentence()) for duel in group.duels)))
        table = page.table(DUEL_COLUMNS, map(duel_row, group.duels))
        parts.append(page.details("All comparisons as a table", table))
    outcomes = page.table(OUTCOME_COLUMNS, map(outcome_row, group.runs))
    parts.append(page.details("How the questions ended", outcomes))
    return parts


def _scores_chart(group: Group) -> Markup:
    dots = [dot for run in group.runs for dot in _dots(run)]
    chance = CHANCE.get(group.task)
    unit = "% right" + (f"; the line is chance, {100 * chance:.0f} %" if chance else "")
    reference = 100 * chance if chance else None
    return page.forest(f"{group.title}: share right, with 95 % intervals", dots, reference, unit)


def _dots(run: Run) -> list[Dot]:
    one = run.summary
    if not run.is_scored:
        return [Dot(run.label, "not scored yet")]
    labels = [f"{run.label}, {name}" for name in run.readings] or [run.label]
    return [
        _dot(label, count, one.scored)
        for label, count in zip(labels, run.right, strict=True)
        if count is not None
    ]


def _dot(label: str, count: int, total: int) -> Dot:
    interval = stats.wilson(count, total)
    value = Value(
        100 * count / total, 100 * interval.low, 100 * interval.high, percent(count, total)
    )
    return Dot(label, value)


def _duels_chart(group: Group) -> Markup:
    dots = [
        Dot(
            f"{duel.first} \u2212 {duel.second}",
            Value(
                100 * duel.difference,
                100 * duel.interval.low,
                100 * duel.interval.high,
                f"{points(duel.difference)}, {stats.p_in_words(duel.p_holm)}",
            ),
            is_shown=duel.is_shown,
        )
        for duel in group.duels
    ]
    title = f"{group.title}: differences, question by question"
    return page.forest(title, dots, 0.0, "percentage points; p after Holm's correction")


def markdown_of(groups: Sequence[Group]) -> str:
    parts = [f"# {TITLE}\n", f"{HOW_TO_READ}\n"]
    for group in groups:
        parts.append(f"## {group.title}\n")
        parts += [f"> {note}\n" for note in group.notes]
        parts.append(page.markdown_table(score_columns(group.readings), map(score_row, group.runs)))
        parts.append(page.markdown_table(OUTCOME_COLUMNS, map(outcome_row, group.runs)))
        if group.duels:
            parts.append("".join(f"- {duel.sentence()}\n" for duel in group.duels))
            parts.append(page.markdown_table(DUEL_COLUMNS, map(duel_row, group.duels)))
    return "\n".join(parts)


def as_json(groups: Sequence[Group]) -> str:
    rows = [
        {
            "task": group.task,
            "title": group.title,
            "runs": [{"label": run.label} | run.summary.as_json() for run in group.runs],
            "comparisons": [
                dataclasses.asdict(duel) | {"is_shown": duel.is_shown} for duel in group.duels
            ],
            "notes": list(group.notes),
        }
        for group in groups
    ]
    return json.dumps({"groups": rows})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Scores with intervals, and comparisons of contestants that were asked the "
        "same questions, from folders of results; also while a run goes on.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a folder of eval.run")
    parser.add_argument("--out", type=Path, help="the page to write (DIR/report.html)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--markdown", action="store_true", help="print Markdown; a page only by --out"
    )
    form.add_argument("--json", action="store_true", help="print JSON; a page only by --out")
    args = parser.parse_args(argv)
    try:
        groups = _read(args.folders)
        out = args.out
        if out is None and not (args.markdown or args.json):
            out = args.folders[0] / "report.html"
        if out is not None:
            journal.write_whole(out, page_of(groups).encode("utf-8", "replace"))
    except (journal.JournalError, ValueError, OSError) as exc:
        print(f"eval.report: {exc}", file=sys.stderr)
        return 1
    if args.json:
        print(as_json(groups))
    elif args.markdown:
        print(markdown_of(groups))
    else:
        _say(groups, out)
    return 0


def _read(folders: Sequence[Path]) -> list[Group]:
    """Raises ValueError where there is nothing, JournalError or OSError."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
    groups = groups_of(results.read_folders(dict.fromkeys(folders)))
    if not groups:
        raise ValueError(f"no results of eval.run in {', '.join(map(str, folders))}")
    return groups


def _say(groups: Sequence[Group], out: Path | None) -> None:
    for group in groups:
        print(group.title)
        for note in group.notes:
            print(f"  ! {note}")
        for run in group.runs:
            print(f"  {run.label}: {results.sentence(run.summary)}")
        for duel in group.duels:
            print(f"  {duel.sentence()}")
    print(f"Report: {out}")


if __name__ == "__main__":
    sys.exit(main())
