"""What a run has left in its folder, and what it comes to.

A folder has one file for each task and contestant, TASK.SLUG.jsonl (mmlu-logprob.SLUG.jsonl
for MMLU's other mode), and one with the verdicts on programs, humaneval-verdicts.jsonl,
which are joined here to the replies.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import journal
from eval import mmlu, stats, tasks
from eval.contestant import Contestant, from_header
from eval.task import CORRECT, ERROR, OUTCOMES, UNSCORED, WRONG

VERDICTS = "humaneval-verdicts.jsonl"
VERDICT_OUTCOMES = {"passed": CORRECT, "failed": WRONG, "timeout": WRONG}
SET_ASIDE = re.compile(r"\.[0-9]+\.jsonl$")  # by bench.journal: an older run

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """One file: one record a question, the last one, each with its final outcome."""

    path: Path
    header: Record
    records: list[Record]

    @property
    def task(self) -> str:
        return str(self.header["decides"]["task"])

    @property
    def mode(self) -> str:
        return str(self.header["decides"].get("mode") or mmlu.CHAT)

    @property
    def contestant(self) -> Contestant:
        return from_header(self.header["decides"]["contestant"])

    @property
    def ids(self) -> list[str]:
        """All that the run is to ask, asked yet or not."""
        return list(self.header["about"]["ids"])


@dataclasses.dataclass(frozen=True)
class Summary:
    """`scored` are the questions that count: errors and programs not yet run do not."""

    task: str
    contestant: Contestant
    questions: int
    scored: int
    correct: int
    outcomes: Mapping[str, int]
    extra: Mapping[str, int]  # how many were right strictly and flexibly, where both were read
    unscored: int
    predicted_n: int
    wall_s: float

    @property
    def share(self) -> float:
        return self.correct / self.scored if self.scored else 0.0

    @property
    def interval(self) -> stats.Interval:
        return stats.wilson(self.correct, self.scored)

    @property
    def is_whole(self) -> bool:
        return self.scored == self.questions

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"contestant": self.contestant.decides()}
        low, high = self.interval.low, self.interval.high
        return fields | {"share": self.share, "low": low, "high": high, "is_whole": self.is_whole}


def file_of(folder: Path, task: str, contestant: Contestant, mode: str = mmlu.CHAT) -> Path:
    return folder / f"{tasks.stem(task, mode)}.{contestant.slug}.jsonl"


def read(path: Path) -> Result:
    """Raises JournalError or OSError."""
    contents = journal.read(path)
    verdicts = read_verdicts(path.parent)
    records = [_with_verdict(record, verdicts) for record in contents.records.values()]
    return Result(path, contents.header, records)


def read_folders(folders: Iterable[Path]) -> list[Result]:
    """Every benchmark's file in them, in the order of names; older runs set aside are left out.

    Raises JournalError or OSError.
    """
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            if path.name.split(".")[0] in tasks.STEMS and not SET_ASIDE.search(path.name):
                found.append(read(path))
    return found


def read_verdicts(folder: Path) -> dict[str, str]:
    """By "<question>/<sha256 of program>": passed, failed, timeout or error, the latest."""
    path = folder / VERDICTS
    if not path.exists():
        return {}
    records = journal.read(path).records
    return {name.rpartition("/")[0]: record["outcome"] for name, record in records.items()}


def _with_verdict(record: Record, verdicts: Mapping[str, str]) -> Record:
    if record["outcome"] != UNSCORED:
        return record
    verdict = verdicts.get(f"{record['id']}/{record['program_sha256']}", "")
    return record | {"outcome": VERDICT_OUTCOMES.get(verdict, UNSCORED), "verdict": verdict}


def summary(result: Result) -> Summary:
    counts = Counter(record["outcome"] for record in result.records)
    scored = sum(counts[name] for name in OUTCOMES if name != ERROR)
    measured = [record["measured"] for record in result.records if "measured" in record]
    return Summary(
        task=result.task,
        contestant=result.contestant,
        questions=len(result.ids),
        scored=scored,
        correct=counts[CORRECT],
        outcomes={name: counts[name] for name in OUTCOMES},
        extra=_by_reading(result),
        unscored=counts[UNSCORED],
        predicted_n=sum(row.get("predicted_n") or 0 for row in measured),
        wall_s=round(sum(row.get("wall_ms") or 0 for row in measured) / 1000, 1),
    )


def _by_reading(result: Result) -> dict[str, int]:
    """How many each reading found right; none where an older grader read in one way only."""
    replies = [record for record in result.records if record["outcome"] != ERROR]
    names = ("strict", "flexible")
    if not replies or any(name not in record for record in replies for name in names):
        return {}
    return {name: sum(bool(record[name]) for record in replies) for name in names}


def sentence(one: Summary) -> str:
    """12/50 = 24.0 % [14.3, 37.4]  wrong 36, truncated 2."""
    low, high = (f"{100 * value:.1f}" for value in (one.interval.low, one.interval.high))
    said = f"{one.correct}/{one.scored} = {100 * one.share:.1f} % [{low}, {high}]"
    others = [f"{name} {one.outcomes[name]}" for name in OUTCOMES[1:] if one.outcomes[name]]
    others += [f"not run yet {one.unscored}"] * bool(one.unscored)
    others += [f"{name} {count}/{one.scored}" for name, count in one.extra.items()]
    return f"{said}  {', '.join(others)}".rstrip()
