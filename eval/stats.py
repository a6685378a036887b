"""What few questions can say: intervals, exact tests and a ranking that admits its width.

Everything random is drawn with a seed, so the same answers give the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

Z_95 = 1.959963984540054  # the normal distribution has 95 % within so many deviations
BOOTSTRAP_DRAWS = 10_000
REFITS = 500  # of a ranking: each is a fit, not a mean
SEED = 20240
PRIOR_TIES = 0.5  # games each pair is taken to have drawn, so that nobody is infinitely strong
MM_STEPS = 2_000
MM_ACCURACY = 1e-9
ELO_MEAN = 1000.0
ELO_PER_DECADE = 400.0


@dataclasses.dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


def wilson(hits: int, total: int, z: float = Z_95) -> Interval:
    """The interval for a share (E. B. Wilson 1927); all of [0, 1] where nothing was asked."""
    if not total:
        return Interval(0.0, 1.0)
    share, weight = hits / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p that a fair coin falls at least so unevenly; ties are left out."""
    total, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << total))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p for two contestants that answered the same questions.

    The arguments count the questions that only one of the two got right: under the null
    hypothesis each of these is a fair coin.
    """
    return sign_test(only_first, only_second)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values, each corrected for how many are looked at (S. Holm 1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[at]))
        corrected[at] = highest
    return corrected


def p_in_words(p: float) -> str:
    """p = 0.042, or p < 0.001: it is never nothing."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def paired_bootstrap(
    differences: Sequence[float], *, seed: int = SEED, draws: int = BOOTSTRAP_DRAWS
) -> Interval:
    """95 % interval of the mean difference, questions drawn again with replacement.

    `differences` holds one number a question: first contestant less second.
    """
    if not differences:
        return Interval(0.0, 0.0)
    count = len(differences)
    draw = random.Random(seed).choices
    return percentiles([sum(draw(differences, k=count)) / count for _ in range(draws)])


def percentiles(values: Iterable[float], low: float = 0.025, high: float = 0.975) -> Interval:
    """Between neighbours it is a straight line, as numpy.percentile has it."""
    ordered = sorted(values)
    return Interval(_at(ordered, low), _at(ordered, high))


def _at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


# --- Bradley-Terry


@dataclasses.dataclass(frozen=True)
class Game:
    """What one prompt (or voter) said of two contestants. A tie counts half for each."""

    prompt: str
    first: str
    second: str
    score: float  # of the first: 1, 0.5 or 0


@dataclasses.dataclass(frozen=True)
class Rating:
    contestant: str
    elo: float  # the mean of all is 1000
    interval: Interval
    wins: int
    ties: int
    losses: int


def bradley_terry(names: Sequence[str], games: Iterable[Game]) -> dict[str, float]:
    """Strengths on the Elo scale, fitted by minorise-maximise (D. R. Hunter 2004).

    Each pair is taken to have drawn PRIOR_TIES games besides, so that also one who won
    all, or none, has a finite strength.
    """
    points = dict.fromkeys(names, PRIOR_TIES / 2 * (len(names) - 1))
    met = {pair: PRIOR_TIES for one in combinations(names, 2) for pair in (one, one[::-1])}
    for game in games:
        points[game.first] += game.score
        points[game.second] += 1 - game.score
        met[game.first, game.second] += 1
        met[game.second, game.first] += 1
    strengths = dict.fromkeys(names, 1.0)
    for _ in range(MM_STEPS):
        new = _mm_step(names, points, met, strengths)
        moved = max((abs(new[name] / strengths[name] - 1) for name in names), default=0.0)
        strengths = new
        if moved < MM_ACCURACY:
            break
    return {
        name: ELO_MEAN + ELO_PER_DECADE * math.log10(strength)
        for name, strength in strengths.items()
    }


def _mm_step(
    names: Sequence[str],
    points: Mapping[str, float],
    met: Mapping[tuple[str, str], float],
    strengths: Mapping[str, float],
) -> dict[str, float]:
    """One step, scaled so that the geometric mean of the strengths is 1."""
    new = {}
    for name in names:
        others = (other for other in names if other != name)
        against = sum(met[name, it] / (strengths[name] + strengths[it]) for it in others)
        new[name] = points[name] / against if against else 1.0
    mean = math.exp(sum(math.log(value) for value in new.values()) / len(new)) if new else 1.0
    return {name: value / mean for name, value in new.items()}


def ratings(
    names: Sequence[str], games: Sequence[Game], *, seed: int = SEED, refits: int = REFITS
) -> list[Rating]:
    """All contestants, the strongest first, with 95 % intervals.

    The intervals come from drawing PROMPTS again: verdicts on one prompt are not
    independent of each other, and to draw these would make the intervals too narrow.
    """
    fitted = bradley_terry(names, games)
    by_prompt: dict[str, list[Game]] = {}
    for game in games:
        by_prompt.setdefault(game.prompt, []).append(game)
    clusters, draw = list(by_prompt.values()), random.Random(seed).choices
    spread: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(refits if clusters else 1):
        drawn = draw(clusters, k=len(clusters)) if clusters else []
        again = bradley_terry(names, (game for cluster in drawn for game in cluster))
        for name in names:
            spread[name].append(again[name])
    found = [
        Rating(name, fitted[name], percentiles(spread[name]), *_record(name, games))
        for name in names
    ]
    return sorted(found, key=lambda rating: -rating.elo)


def _record(name: str, games: Iterable[Game]) -> tuple[int, int, int]:
    """Games won, drawn and lost."""
    mine = [
        game.score if game.first == name else 1 - game.score
        for game in games
        if name in (game.first, game.second)
    ]
    return (
        sum(score > 0.5 for score in mine),
        sum(score == 0.5 for score in mine),
        sum(score < 0.5 for score in mine),
    )
