"""The statistics against numbers that scipy 1.17.1 and statsmodels 0.15.0 gave."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from eval import stats
from eval.stats import Game, Interval


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # statsmodels.stats.proportion.proportion_confint(hits, total, method="wilson")
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371106, 1.0),
        (35, 50, 0.5624964953554659, 0.8089644649911905),
        (80, 100, 0.7111708344068411, 0.8666330666689676),
        (115, 164, 0.6272140413534487, 0.766014190000928),
        (1, 20, 0.008881448800795402, 0.2361311934467421),
    ],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    found = stats.wilson(hits, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_without_questions_the_interval_is_everything() -> None:
    assert stats.wilson(0, 0) == Interval(0.0, 1.0)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [  # statsmodels.stats.contingency_tables.mcnemar(..., exact=True).pvalue
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (8, 1, 0.0390625),
        (9, 2, 0.0654296875),
        (15, 6, 0.0783538818359375),
        (3, 3, 1.0),
        (40, 61, 0.046044066929342785),
    ],
)
def test_exact_mcnemar(only_first: int, only_second: int, p: float) -> None:
    assert stats.mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-12)
    assert stats.mcnemar(only_second, only_first) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [  # scipy.stats.binomtest(wins, wins + losses).pvalue
        (11, 3, 0.057373046875),
        (12, 2, 0.012939453125),
        (0, 0, 1.0),
    ],
)
def test_sign_test(wins: int, losses: int, p: float) -> None:
    assert stats.sign_test(wins, losses) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [  # statsmodels.stats.multitest.multipletests(p_values, method="holm")[1]
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6, 0.02], [1.0, 1.0, 0.06]),
        ([0.001, 0.001, 0.2, 0.04, 0.9], [0.005, 0.005, 0.4, 0.12, 0.9]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], corrected: list[float]) -> None:
    assert stats.holm(p_values) == pytest.approx(corrected, abs=1e-12)


def test_percentiles_lie_where_numpy_has_them() -> None:
    found = stats.percentiles([3, 1, 4, 1, 5, 9, 2, 6])  # numpy.percentile(..., [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((1.0, 8.475))


def test_the_paired_bootstrap_finds_scipys_interval() -> None:
    differences = [1] * 12 + [-1] * 4 + [0] * 34
    # scipy.stats.bootstrap(..., numpy.mean, method="percentile", n_resamples=200000)
    found = stats.paired_bootstrap(differences)
    assert (found.low, found.high) == pytest.approx((0.02, 0.32), abs=0.0201)
    assert found == stats.paired_bootstrap(differences), "a seed makes it the same each time"


def test_a_bootstrap_of_equal_contestants_has_no_width() -> None:
    assert stats.paired_bootstrap([0.0] * 20, draws=50) == Interval(0.0, 0.0)
    assert stats.paired_bootstrap([]) == Interval(0.0, 0.0)


def games(first: str, second: str, wins: int, losses: int, ties: int = 0) -> list[Game]:
    scores = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Game(f"p{at}", first, second, score) for at, score in enumerate(scores)]


PLAYED = games("a", "b", 9, 3, 2) + games("a", "c", 10, 4) + games("b", "c", 6, 5, 3)


def test_bradley_terry_is_the_maximum_of_the_likelihood() -> None:
    # scipy.optimize.minimize of the negative log-likelihood, with the same prior ties
    expected = {"a": 1102.0130289667597, "b": 957.4694580228529, "c": 940.5175130103873}
    assert stats.bradley_terry("abc", PLAYED) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("wins", [0, 14])
def test_who_wins_all_or_nothing_stays_finite(wins: int) -> None:
    found = stats.bradley_terry("ab", games("a", "b", wins, 14 - wins))
    odds = (wins + stats.PRIOR_TIES / 2) / (14 - wins + stats.PRIOR_TIES / 2)
    assert found["a"] - found["b"] == pytest.approx(400 * math.log10(odds), abs=0.01)


def test_without_games_all_are_equal() -> None:
    assert [rating.elo for rating in stats.ratings("abc", [])] == pytest.approx([1000.0] * 3)
    assert stats.ratings([], []) == []


def test_ratings_are_in_order_and_count_games() -> None:
    found = stats.ratings("abc", PLAYED, refits=50)
    assert [rating.contestant for rating in found] == ["a", "b", "c"]
    assert [(it.wins, it.ties, it.losses) for it in found] == [(19, 2, 7), (9, 5, 14), (9, 3, 16)]
    assert all(it.interval.low <= it.elo <= it.interval.high for it in found)


def test_the_interval_knows_that_verdicts_on_one_prompt_belong_together() -> None:
    """Ten verdicts that repeat each other on 6 prompts are no 60 verdicts."""
    clustered = [Game(f"p{at % 6}", "a", "b", float(at % 6 < 4)) for at in range(60)]
    spread = [Game(f"p{at}", "a", "b", float(at % 6 < 4)) for at in range(60)]
    of_few, of_many = (
        stats.ratings("ab", it, refits=200)[0].interval for it in (clustered, spread)
    )
    assert of_few.high - of_few.low > 2 * (of_many.high - of_many.low)


def test_eight_models_are_ranked_in_a_bearable_time() -> None:
    """No time limit of its own: the suite's would end it if the fit did not converge."""
    draw = random.Random(1)
    names = [f"m{at}" for at in range(8)]
    played = [
        Game(f"p{prompt}", first, second, draw.choice([0.0, 0.5, 1.0]))
        for prompt in range(14)
        for first, second in combinations(names, 2)
    ]
    assert len(stats.ratings(names, played, refits=100)) == 8
