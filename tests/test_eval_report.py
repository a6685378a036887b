"""The report of the benchmarks, from files of results as eval.run leaves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench import journal
from eval import report
from eval.contestant import Contestant
from eval.report import Group
from eval.results import file_of, read_folders
from tests.browser import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

RIGHT, WRONG = "correct", "wrong"


def run_in(
    folder: Path,
    contestant: Contestant,
    outcomes: Sequence[str],
    *,
    task: str = "mmlu",
    asked: int | None = None,
    **decides: Any,
) -> Path:
    """A results file with one record for each outcome; `asked` questions belong to the run."""
    ids = [f"{task}/{number}" for number in range(asked or len(outcomes))]
    header = {
        "task": task,
        "mode": "chat",
        "contestant": contestant.decides(),
        "ids_sha256": f"ids {len(ids)}",
        "data_sha256": "data",
        "prompt_version": "1",
        "seed": 1,
        "sampling": {"max_tokens": 100},
    }
    path = file_of(folder, task, contestant, decides.get("mode", "chat"))
    with journal.opened(path, header | decides, {"ids": ids}) as file:
        for name, outcome in zip(ids, outcomes, strict=False):
            file.append(record(name, outcome, task))
    return path


def record(name: str, outcome: str, task: str) -> dict[str, Any]:
    found: dict[str, Any] = {"id": name, "outcome": outcome, "grader": "1"}
    if outcome == "unscored":
        found["program_sha256"] = "no verdict yet"
    if outcome != "error":
        found["measured"] = {"wall_ms": 1500.0, "predicted_n": 20}
    if task == "gsm8k":
        found |= {"flexible": outcome == RIGHT, "strict": outcome == RIGHT and name != "gsm8k/0"}
    if task == "mmlu":
        found |= {"strict": outcome == RIGHT, "flexible": outcome == RIGHT}
    return found


def groups(*folders: Path) -> list[Group]:
    return report.groups_of(read_folders(folders))


A, B, C = Contestant("alpha"), Contestant("beta", "-c 512"), Contestant("gamma")


def test_scores_with_intervals_and_how_the_rest_ended(tmp_path: Path) -> None:
    outcomes = [RIGHT] * 7 + [WRONG] * 5 + ["no_answer"] * 4 + ["truncated"] * 2 + ["empty"] * 2
    run_in(tmp_path, A, outcomes)
    (group,) = groups(tmp_path)
    row = [str(cell) for cell in report.score_row(group.runs[0])]
    assert row == (
        "alpha|20 of 20|35.0 % [18.1, 56.7]|35.0 % [18.1, 56.7]|10 %|20 %|10 %|400|20.0|30 s".split(
            "|"
        )
    )
    assert report.outcome_row(group.runs[0]) == ["alpha", *"7 5 4 2 2 0 0".split()]
    assert group.duels == []
    assert any("20 % of the replies are without an answer" in note for note in group.notes)


def test_gsm8k_has_a_strict_and_a_flexible_score(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 5 + [WRONG] * 5, task="gsm8k")
    (group,) = groups(tmp_path)
    titles = [column.title for column in report.score_columns(group.readings)]
    shown = dict(zip(titles, report.score_row(group.runs[0]), strict=True))
    assert shown["right (flexible)"] == "50.0 % [23.7, 76.3]"
    assert shown["right (strict)"] == "40.0 % [16.8, 68.7]"


def test_mmlu_has_a_strict_score_first_and_a_flexible_one_beside_it(tmp_path: Path) -> None:
    path = run_in(tmp_path, A, [RIGHT] * 5 + ["no_answer"] * 5)
    (group,) = groups(tmp_path)
    assert not any("read flexibly" in note for note in group.notes)
    text = path.read_bytes()
    for number, letter in ((5, "B"), (6, "C")):
        old = b'"strict":false,"flexible":false}\n'
        at = text.index(old, text.index(b'"id":"mmlu/%d"' % number))
        new = {"strict": False, "flexible": letter == "B", "flexible_answer": letter}
        text = text[:at] + journal.as_line(new)[1:] + text[at + len(old) :]
    path.write_bytes(text)
    (group,) = groups(tmp_path)
    titles = [column.title for column in report.score_columns(group.readings)]
    assert titles[2:4] == ["right (strict)", "right (flexible)"]
    assert report.score_row(group.runs[0])[2:4] == ["50.0 % [23.7, 76.3]", "60.0 % [31.3, 83.2]"]
    told = "alpha: read flexibly, 2 more replies have an answer, and 6 instead of 5 are right."
    assert told in group.notes


def test_replies_that_an_older_grader_read_in_one_way_have_one_score_and_it_says_so(
    tmp_path: Path,
) -> None:
    path = run_in(tmp_path, A, [RIGHT] * 4)
    path.write_bytes(path.read_bytes().replace(b',"strict":true,"flexible":true', b"", 1))
    (group,) = groups(tmp_path)
    assert group.runs[0].summary.extra == {}
    assert report.score_row(group.runs[0])[2:4] == ["100.0 % [51.0, 100.0]", ""]
    assert any("regrade --write reads its replies in both" in note for note in group.notes)
    assert "alpha, flexible" not in report.page_of([group])


def test_the_two_modes_of_mmlu_in_one_folder_are_two_tables(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 4)
    run_in(tmp_path, A, [WRONG] * 4, mode="logprob")
    logprob, chat = groups(tmp_path)
    assert logprob.title == "MMLU, logprob, questions 1 of 2"
    assert chat.title == "MMLU, questions 2 of 2"
    assert [group.runs[0].label for group in (chat, logprob)] == ["alpha", "alpha"]
    assert [column.title for column in report.score_columns(logprob.readings)][2] == "right"
    assert report.score_row(logprob.runs[0])[2:4] == ["0.0 % [0.0, 49.0]", "0 %"]


def test_two_contestants_are_compared_question_by_question(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 15 + [WRONG] * 5)
    run_in(tmp_path, B, [RIGHT] * 5 + [WRONG] * 15)
    (group,) = groups(tmp_path)
    (duel,) = group.duels
    assert (duel.both, duel.only_first, duel.only_second) == (20, 10, 0)
    assert duel.p == duel.p_holm == pytest.approx(2 / 2**10)
    assert duel.difference == 0.5
    assert duel.interval.excludes(0)
    assert duel.sentence() == (
        "alpha got more right than beta -c 512 (right where the other is not: 10 and 0; p = 0.002)"
    )


def test_the_worse_of_two_is_said_to_be_worse_also_when_it_comes_first(tmp_path: Path) -> None:
    run_in(tmp_path, A, [WRONG] * 12)
    run_in(tmp_path, C, [RIGHT] * 12)
    (duel,) = groups(tmp_path)[0].duels
    assert duel.sentence().startswith("alpha got fewer right than gamma ")


def test_a_gap_that_may_be_chance_is_no_ranking(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 5 + [WRONG] * 15)
    run_in(tmp_path, B, [WRONG] * 20)
    (duel,) = groups(tmp_path)[0].duels
    assert duel.p == pytest.approx(0.0625)
    assert "alpha against beta -c 512: no difference shown" in duel.sentence()


def test_many_comparisons_make_each_harder_to_believe(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 6 + [WRONG] * 14)
    run_in(tmp_path, B, [WRONG] * 20)
    run_in(tmp_path, C, [WRONG] * 20)
    duels = groups(tmp_path)[0].duels
    assert [round(duel.p, 4) for duel in duels] == [0.0312, 0.0312, 1.0]
    assert [round(duel.p_holm, 4) for duel in duels] == [0.0938, 0.0938, 1.0]
    assert not any(duel.is_shown for duel in duels)


def test_runs_with_other_questions_are_not_compared_and_it_says_so(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 10)
    run_in(tmp_path, B, [WRONG] * 10, ids_sha256="other ids", seed=2)
    first, second = groups(tmp_path)
    assert first.duels == second.duels == []
    assert first.title == "MMLU, questions 1 of 2"
    for group in (first, second):
        assert any("Not compared" in note and "ids_sha256" in note for note in group.notes)
    assert any("seed 1, now 2" in note for note in second.notes)


def test_other_settings_are_compared_but_named(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT] * 10)
    run_in(tmp_path, B, [WRONG] * 10, sampling={"max_tokens": 5})
    (group,) = groups(tmp_path)
    assert len(group.duels) == 1
    assert group.notes == [
        "beta -c 512 was not asked as alpha was: sampling.max_tokens: 100, now 5."
    ]


def test_an_unfinished_run_says_so_and_counts_what_is_there(tmp_path: Path) -> None:
    run_in(tmp_path, A, [RIGHT, WRONG, "error"], asked=10)
    run_in(tmp_path, B, [RIGHT] * 10)
    (group,) = groups(tmp_path)
    assert group.duels[0].both == 2
    told = "\n".join(group.notes)
    assert "alpha is not finished: 3 of 10 questions asked." in told
    assert "alpha: 1 questions have no reply" in told
    assert report.score_row(group.runs[0])[1:3] == ["2 of 10", "50.0 % [9.5, 90.5]"]
    assert not any("in one way only" in note for note in group.notes), "an error is no reply"


def test_before_its_programs_were_run_a_contestant_has_no_score(tmp_path: Path) -> None:
    """Else only the replies without a program would count, none of which is right."""
    run_in(tmp_path, A, ["truncated", "no_answer"] + ["unscored"] * 18, task="humaneval")
    run_in(tmp_path, B, [RIGHT] * 20, task="humaneval")
    (group,) = groups(tmp_path)
    assert group.duels == []
    row = report.score_row(group.runs[0])
    assert row[1:5] == ["2 of 20", "", "5 %", "5 %"]
    assert "alpha: 18 programs were not run yet, so it has no score" in group.notes[0]
    assert "not scored yet" in report.page_of([group])


def test_a_torn_end_and_a_run_that_has_not_begun_do_not_matter(tmp_path: Path) -> None:
    path = run_in(tmp_path, A, [], asked=10)
    with path.open("ab") as file:
        file.write(b'{"id": "mmlu/0", "outco')
    (group,) = groups(tmp_path)
    assert report.score_row(group.runs[0])[1] == "0 of 10"
    assert "not scored yet" in report.page_of([group])


def test_one_contestant_in_two_folders_is_told_apart(tmp_path: Path) -> None:
    for name in ("old", "new"):
        run_in(tmp_path / name, A, [RIGHT] * 3)
    (group,) = groups(tmp_path / "old", tmp_path / "new")
    old, new = tmp_path / "old", tmp_path / "new"
    assert [run.label for run in group.runs] == [f"alpha ({old})", f"alpha ({new})"]


def test_mixed_graders_are_named(tmp_path: Path) -> None:
    path = run_in(tmp_path, A, [RIGHT] * 3)
    path.write_bytes(path.read_bytes().replace(b'"grader":"1"', b'"grader":"2"', 1))
    assert "was graded by 1 and 2: python -m eval.regrade" in groups(tmp_path)[0].notes[0]


# --- the program


def test_it_prints_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_in(tmp_path, A, [RIGHT] * 7 + [WRONG] * 3)
    run_in(tmp_path, B, [RIGHT] * 6 + [WRONG] * 4)
    assert report.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "alpha: 7/10 = 70.0 % [39.7, 89.2]" in said
    assert "no difference shown" in said
    assert str(tmp_path / "report.html") in said
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_markdown_and_json_write_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path, A, [RIGHT] * 7 + [WRONG] * 3)
    run_in(tmp_path, C, [RIGHT] * 7 + [WRONG] * 3)
    assert report.main([str(tmp_path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert (
        "| alpha | 10 of 10 | 70.0 % [39.7, 89.2] | 70.0 % [39.7, 89.2] | 0 % | 0 % | 0 % |" in said
    )
    assert "alpha against gamma: no difference shown" in said
    assert report.main([str(tmp_path), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert [run["share"] for run in group["runs"]] == [0.7, 0.7]
    assert group["comparisons"][0]["is_shown"] is False
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", ["empty", "missing", "broken"])
def test_what_cannot_be_read_is_an_error_in_words(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "missing" if kind == "missing" else tmp_path
    if kind == "broken":
        (tmp_path / "mmlu.x-123456.jsonl").write_text("no header\n", encoding="utf-8")
    assert report.main([str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("eval.report: ")
    assert str(tmp_path) in said


@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_in_a_browser(tmp_path: Path, browser: Browser, is_dark: bool) -> None:
    run_in(tmp_path, A, [RIGHT] * 15 + [WRONG] * 5)
    run_in(tmp_path, B, [RIGHT] * 5 + [WRONG] * 15)
    run_in(tmp_path, Contestant("<b>gamma</b>"), [WRONG] * 18 + ["truncated"] * 2)
    run_in(tmp_path, A, [RIGHT] * 5 + [WRONG] * 5, task="gsm8k")
    assert report.main([str(tmp_path)]) == 0
    with opened(browser, tmp_path / "report.html", is_dark=is_dark) as view:
        assert view.page.locator("svg").count() == 3
        assert view.page.locator("svg").first.locator(".dot").count() == 6, "two readings each"
        assert view.page.locator("svg").nth(1).locator(".good, .bad").count() == 2
        assert view.page.locator("main b").count() == 0, "a name became markup"
        assert (view.collisions(), view.complaints, view.requests) == ([], [], [])
        assert not view.is_scrolled_sideways()
