"""What an A/B folder holds and what it comes to: replies, checks, verdicts, votes.

A folder has one file for each contestant, ab.SLUG.jsonl, one for each judge,
ab-judge.SLUG.jsonl, and, where somebody voted, ab-votes.json.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bench import journal
from eval import checks, judge, stats, votes
from eval.checks import Finding, Runner
from eval.contestant import Contestant, from_header
from eval.judge import Entry, Habits, Pair
from eval.roles import Prompt
from eval.stats import Game, Rating
from eval.task import Reply as Said

TASK = "ab"
JUDGE_TASK = "ab-judge"
OK, TRUNCATED, EMPTY, ERROR = "ok", "truncated", "empty", "error"
SET_ASIDE = re.compile(r"\.[0-9]+\.jsonl$")  # by bench.journal: an older run
NO_DIFFERENCE = 0.05

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Answered:
    """One contestant's reply to one prompt. `visible` is without thoughts."""

    record: Record
    visible: str
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> str:
        return str(self.record["outcome"])

    @property
    def passed(self) -> int:
        return sum(finding.state == "passed" for finding in self.findings)

    @property
    def failed(self) -> int:
        return sum(finding.state == "failed" for finding in self.findings)

    @property
    def share(self) -> float:
        """Of the checks that were made."""
        return self.passed / max(1, self.passed + self.failed)

    @property
    def wall_s(self) -> float | None:
        wall_ms = self.record["measured"].get("wall_ms")
        return None if wall_ms is None else wall_ms / 1000

    @property
    def tokens(self) -> int | None:
        count = self.record["measured"].get("predicted_n")
        return None if count is None else int(count)

    @property
    def tokens_per_s(self) -> float | None:
        """The first token comes with the prompt, so it is not counted."""
        elapsed_ms = self.record["measured"].get("predicted_ms")
        if not self.tokens or self.tokens < 2 or not elapsed_ms:
            return None
        return (self.tokens - 1) / float(elapsed_ms) * 1000

    @property
    def calls(self) -> str:
        """The tool calls as text, one a line."""
        calls = checks.Reply.of(self.record).tool_calls
        return "\n".join(f"{call.name}({call.arguments})" for call in calls)

    @property
    def text(self) -> str:
        """All that a reader, judge or voter is to see."""
        return "\n\n".join(part for part in (self.visible.strip(), self.calls) if part)


@dataclasses.dataclass(frozen=True)
class Side:
    """One contestant: its header and what it answered, by the id of the prompt."""

    contestant: Contestant
    header: Record
    answers: Mapping[str, Answered]
    errors: int

    @property
    def slug(self) -> str:
        return self.contestant.slug

    @property
    def settings(self) -> Record:
        """All that decided the answers, who answers left out."""
        return {key: it for key, it in self.header["decides"].items() if key != "contestant"}

    def count(self, outcome: str) -> int:
        return sum(answered.outcome == outcome for answered in self.answers.values())

    @property
    def perfect(self) -> int:
        """Prompts without a failed check."""
        return sum(not answered.failed for answered in self.answers.values())

    @property
    def passed(self) -> int:
        return sum(answered.passed for answered in self.answers.values())

    @property
    def judged(self) -> int:
        return self.passed + sum(answered.failed for answered in self.answers.values())

    @property
    def tokens(self) -> int:
        return sum(answered.tokens or 0 for answered in self.answers.values())

    @property
    def median_tokens_per_s(self) -> float | None:
        return _median(answered.tokens_per_s for answered in self.answers.values())

    @property
    def median_wall_s(self) -> float | None:
        return _median(answered.wall_s for answered in self.answers.values())


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@dataclasses.dataclass(frozen=True)
class Duel:
    """Two contestants over the prompts that both answered."""

    first: str  # slugs
    second: str
    wins: int
    ties: int
    losses: int
    p: float  # exact sign test over prompts
    p_holm: float  # and corrected for how many duels are looked at

    @property
    def is_shown(self) -> bool:
        return self.p_holm < NO_DIFFERENCE


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What one source of verdicts (checks, a judge, votes) says."""

    source: str
    note: str
    games: Sequence[Game]
    ratings: Sequence[Rating]
    duels: Sequence[Duel]

    @classmethod
    def of(cls, source: str, note: str, names: Sequence[str], games: Sequence[Game]) -> Ranking:
        met = {name for game in games for name in (game.first, game.second)}
        names = [name for name in names if name in met]
        return cls(source, note, games, stats.ratings(names, games), duels(names, games))


def duels(names: Sequence[str], games: Sequence[Game]) -> list[Duel]:
    """Every two of them; several verdicts on one prompt count as their mean, once."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for game in games:
        scores.setdefault((game.first, game.second), {}).setdefault(game.prompt, []).append(
            game.score
        )
        scores.setdefault((game.second, game.first), {}).setdefault(game.prompt, []).append(
            1 - game.score
        )
    counted = []
    for first, second in combinations(names, 2):
        means = [statistics.fmean(it) for it in scores.get((first, second), {}).values()]
        wins, losses = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
        counted.append((first, second, wins, len(means) - wins - losses, losses))
    p_values = [stats.sign_test(wins, losses) for _, _, wins, _, losses in counted]
    return [
        Duel(*one, p, p_holm)
        for one, p, p_holm in zip(counted, p_values, stats.holm(p_values), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`notes` are what a reader must know before the numbers."""

    prompts: Sequence[Prompt]
    sides: Sequence[Side]
    rankings: Sequence[Ranking]
    notes: Sequence[str]

    def entries(self) -> dict[str, list[Entry]]:
        """The replies that can be compared, by the id of the prompt."""
        return entries_of(self.prompts, self.sides)


def file_of(folder: Path, contestant: Contestant) -> Path:
    return folder / f"{TASK}.{contestant.slug}.jsonl"


def judge_file_of(folder: Path, contestant: Contestant) -> Path:
    return folder / f"{JUDGE_TASK}.{contestant.slug}.jsonl"


def read(folder: Path, prompts: Sequence[Prompt], run: Runner | None = None) -> Comparison:
    """All of a folder as it is now, also while a run goes on.

    Checks are made anew each time, so a check that was bettered counts for old replies
    too. With `run` those that execute what a model wrote are made as well.

    Raises JournalError, BadSheet or OSError.
    """
    sides = [_side(path, prompts, run) for path in _files(folder, TASK)]
    all_pairs = judge.pairs(prompts, entries_of(prompts, sides))
    names = [side.slug for side in sides]
    rankings = [Ranking.of("Checks", CHECKS_NOTE, names, check_games(prompts, sides))]
    rankings += [_judged(path, all_pairs, names) for path in _files(folder, JUDGE_TASK)]
    voted = votes.stored(folder / votes.VOTES)
    if voted:
        rankings.append(_voted(voted, all_pairs, names))
    return Comparison(prompts, sides, rankings, _notes(prompts, sides))


def same_replies(found: Comparison) -> list[str]:
    """Where two sets of flags of one model, asked greedily, gave the very same text."""
    lines = []
    for first, second in combinations(found.sides, 2):
        if first.contestant.model != second.contestant.model:
            continue
        both = [name for name in first.answers if name in second.answers]
        same = sum(first.answers[name].text == second.answers[name].text for name in both)
        lines.append(
            f"{first.contestant} and {second.contestant} gave the same text {same} of "
            f"{len(both)} times."
        )
    return lines


CHECKS_NOTE = (
    "Of two replies to a prompt the one with the greater share of passed checks wins; as many "
    "is a tie."
)


def _files(folder: Path, task: str) -> list[Path]:
    return [
        path for path in sorted(folder.glob(f"{task}.*.jsonl")) if not SET_ASIDE.search(path.name)
    ]


def _side(path: Path, prompts: Sequence[Prompt], run: Runner | None) -> Side:
    contents = journal.read(path)
    answers, errors = {}, 0
    for prompt in prompts:
        record = contents.records.get(f"{TASK}/{prompt.id}")
        if record is None or record.get("prompt_sha256") != prompt.sha256:
            continue
        if record["outcome"] == ERROR:
            errors += 1
            continue
        answers[prompt.id] = answered(record, prompt, run)
    contestant = from_header(contents.header["decides"]["contestant"])
    return Side(contestant, contents.header, answers, errors)


def answered(record: Record, prompt: Prompt, run: Runner | None = None) -> Answered:
    visible = Said(record["reply"], record["finish_reason"]).visible
    reply = dataclasses.replace(checks.Reply.of(record), text=visible)
    return Answered(record, visible, tuple(checks.findings(prompt.checks, reply, run)))


def entries_of(prompts: Sequence[Prompt], sides: Sequence[Side]) -> dict[str, list[Entry]]:
    return {
        prompt.id: [
            Entry(side.contestant, side.answers[prompt.id].text)
            for side in sides
            if prompt.id in side.answers
        ]
        for prompt in prompts
    }


def check_games(prompts: Sequence[Prompt], sides: Sequence[Side]) -> list[Game]:
    found = []
    for prompt in prompts:
        there = [side for side in sides if prompt.id in side.answers]
        for first, second in combinations(there, 2):
            one, other = first.answers[prompt.id].share, second.answers[prompt.id].share
            score = 0.5 if one == other else float(one > other)
            found.append(Game(prompt.id, first.slug, second.slug, score))
    return found


def _judged(path: Path, all_pairs: Sequence[Pair], names: Sequence[str]) -> Ranking:
    contents = journal.read(path)
    who = from_header(contents.header["decides"]["contestant"])
    asked = [pair for pair in all_pairs if _is_judged(pair, contents.records)]
    found = judge.rulings(asked, contents.records)
    own = sum(judge.is_own(pair, who) for pair in all_pairs)
    judged_own = sum(judge.is_own(ruling.pair, who) for ruling in found)
    note = Habits.of(found).sentence() + "."
    if own > judged_own:
        note += f" {own - judged_own} pairs with a reply of its own were not shown to it."
    if judged_own:
        note += f" {judged_own} pairs hold a reply of its own: judges prefer these."
    return Ranking.of(f"Judge {who}", note, names, judge.games(found))


def _is_judged(pair: Pair, records: Mapping[str, Record]) -> bool:
    """Equal texts are asked of nobody; their record says that this judge was to see them."""
    return all(judge.is_done(records.get(pair.id(order)), pair) for order in judge.ORDERS)


def _voted(
    voted: Sequence[votes.Voted], all_pairs: Sequence[Pair], names: Sequence[str]
) -> Ranking:
    known = {pair.sha256 for pair in all_pairs}
    games = [one.game for one in voted if one.pair_sha256 in known]
    note = f"{len(games)} votes on a blind sheet."
    if len(games) < len(voted):
        note += f" {len(voted) - len(games)} more are on replies that are no longer these."
    return Ranking.of("Votes", note, names, games)


def _notes(prompts: Sequence[Prompt], sides: Sequence[Side]) -> list[str]:
    notes = []
    for side in sides:
        missing = len(prompts) - len(side.answers)
        if missing:
            errors = f", {side.errors} of them after an error" if side.errors else ""
            notes.append(
                f"{side.contestant} is not finished: {missing} of {len(prompts)} prompts have no "
                f"reply{errors}."
            )
    for side in sides[1:]:
        for difference in journal.differences(sides[0].settings, side.settings):
            notes.append(
                f"{side.contestant} was not asked as {sides[0].contestant} was: {difference}."
            )
    skipped = sum(
        finding.state == "skipped"
        for side in sides
        for answer in side.answers.values()
        for finding in answer.findings
    )
    if skipped:
        notes.append(
            f"{skipped} checks would run code that a model wrote and were skipped: "
            "--allow-code-execution makes them."
        )
    return notes


def as_json(comparison: Comparison) -> str:
    """The numbers without the texts."""
    sides = [
        {
            "contestant": side.contestant.decides(),
            "slug": side.slug,
            "answered": len(side.answers),
            "prompts": len(comparison.prompts),
            "perfect": side.perfect,
            "checks_passed": side.passed,
            "checks_made": side.judged,
            "truncated": side.count(TRUNCATED),
            "empty": side.count(EMPTY),
            "errors": side.errors,
            "tokens": side.tokens,
            "tokens_per_s": side.median_tokens_per_s,
            "wall_s": side.median_wall_s,
        }
        for side in comparison.sides
    ]
    rankings = [
        {
            "source": ranking.source,
            "note": ranking.note,
            "ratings": [dataclasses.asdict(rating) for rating in ranking.ratings],
            "duels": [
                dataclasses.asdict(duel) | {"is_shown": duel.is_shown} for duel in ranking.duels
            ],
        }
        for ranking in comparison.rankings
    ]
    return json.dumps({"sides": sides, "rankings": rankings, "notes": list(comparison.notes)})
