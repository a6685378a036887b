"""What counts as an answer to MMLU, what is asked, and which questions are drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from eval import mmlu
from eval.data import Choice, Source
from eval.task import CORRECT, EMPTY, NO_ANSWER, TRUNCATED, WRONG, Reply, allocated
from tests.eval_parts import DATA, needs_data

# (reply, finish_reason, outcome, answer) where B is right
REPLIES = [
    ("It is the nerve.\nAnswer: B", "stop", CORRECT, "B"),
    ("Answer: B", "stop", CORRECT, "B"),
    ("answer:b", "stop", CORRECT, "B"),
    ("Answer: $B$", "stop", CORRECT, "B"),
    ("Answer: $B", "stop", CORRECT, "B"),
    ("**Answer:** B", "stop", CORRECT, "B"),
    ("**Answer: B**", "stop", CORRECT, "B"),
    ("Answer: $\\boxed{B}$", "stop", CORRECT, "B"),
    ("Answer: \\text{B}", "stop", CORRECT, "B"),
    ("Answer: (B)", "stop", CORRECT, "B"),
    ("Answer: `B`", "stop", CORRECT, "B"),
    ("The final answer: B. The nerve", "stop", CORRECT, "B"),
    ("Answer: B) The nerve", "stop", CORRECT, "B"),
    ("Answer: C", "stop", WRONG, "C"),
    ("Answer: B\nAnswer: C", "stop", CORRECT, "B"),  # the first, as in simple-evals
    ("Answer: C\n\nAnswer this: Answer: B", "stop", WRONG, "C"),
    ("Answer: Both are right", "stop", NO_ANSWER, None),
    ("Answer: Because of A", "stop", NO_ANSWER, None),
    ("Answer: E", "stop", NO_ANSWER, None),
    ("Answer:\nB", "stop", NO_ANSWER, None),
    ("The answer is B", "stop", NO_ANSWER, None),
    ("B", "stop", NO_ANSWER, None),
    ("Answer: X, where X is A, B, C or D", "stop", NO_ANSWER, None),
    ("", "stop", EMPTY, None),
    ("\n", "stop", EMPTY, None),
    ("It is", "length", TRUNCATED, None),
    ("Answer:", "length", TRUNCATED, None),
    ("Answer: B\n\nNext question", "length", CORRECT, "B"),
    ("<think>Answer: B</think>", "stop", EMPTY, None),
    ("<think>Answer: B", "length", TRUNCATED, None),
    ("<think>Answer: A</think>Answer: B", "stop", CORRECT, "B"),
    ("Answer: A</think>Answer: B", "stop", CORRECT, "B"),
    ("<reasoning>Answer: A</reasoning>\nAnswer: B", "stop", CORRECT, "B"),
    ("<think>Answer: B</think>I do not know", "stop", NO_ANSWER, None),
]

SIZES = {"a": 50, "b": 30, "c": 15, "d": 5}


@pytest.mark.parametrize(("text", "finish_reason", "outcome", "answer"), REPLIES)
def test_a_reply_is_graded(text: str, finish_reason: str, outcome: str, answer: str | None) -> None:
    grade = mmlu.grade(Reply(text, finish_reason), "B")
    assert (grade.outcome, grade.answer) == (outcome, answer)


@pytest.mark.parametrize(
    ("tokens", "outcome", "answer"),
    [
        ((("B", -1.0), ("A", -2.0)), CORRECT, "B"),
        (((" B", -1.0), ("A", -0.5)), WRONG, "A"),
        (((" A", -3.0), ("A", -0.9), (" B", -0.8), ("B", -5.0)), CORRECT, "B"),
        ((("\n", -0.1), (" The", -0.2), (" D", -9.0)), WRONG, "D"),
        ((("  B", -0.1), ("b", -0.2), ("AB", -0.3), ("", -0.4)), NO_ANSWER, None),
        ((("D", -1.0), ("C", -1.0)), WRONG, "C"),  # of equals the first letter
    ],
)
def test_the_likeliest_letter_is_taken(
    tokens: tuple[tuple[str, float], ...], outcome: str, answer: str | None
) -> None:
    grade = mmlu.grade(Reply("\n", "length", tokens), "B")
    assert (grade.outcome, grade.answer) == (outcome, answer)


@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        (100, {"a": 50, "b": 30, "c": 15, "d": 5}),
        (1000, {"a": 50, "b": 30, "c": 15, "d": 5}),
        (10, {"a": 5, "b": 3, "c": 2}),  # 1.5 and 0.5 remain: the first name of equals
        (3, {"a": 2, "b": 1}),
        (1, {"a": 1}),
    ],
)
def test_places_are_given_by_the_largest_remainder(limit: int, counts: dict[str, int]) -> None:
    assert allocated(SIZES, limit) == counts


def test_the_prompts_are_these() -> None:
    choice = Choice("high_school_physics", 3, "What falls?", ("air", "a stone", "fire", "no"), "B")
    chat = mmlu.chat_question(choice)
    assert (chat.id, chat.gold) == ("mmlu/high_school_physics/3", "B")
    assert chat.messages[0]["content"].endswith(
        "Answer: X\n\nWhat falls?\nA. air\nB. a stone\nC. fire\nD. no"
    )
    assert "about high school physics." in chat.messages[0]["content"]
    shot = Choice("high_school_physics", 0, "Is it?", ("w", "x", "y", "z"), "D")
    assert mmlu.logprob_question(choice, [shot]).prompt == (
        "The following are multiple choice questions (with answers) about high school physics."
        "\n\nIs it?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n"
        "What falls?\nA. air\nB. a stone\nC. fire\nD. no\nAnswer:"
    )


@needs_data
def test_a_hundred_questions_are_spread_over_all_subjects_in_proportion() -> None:
    drawn, _ = mmlu.questions(Source(DATA), 1, 100)
    counts = Counter(question.id.split("/")[1] for question in drawn)
    assert len({question.id for question in drawn}) == 100
    assert len(counts) == 57
    assert counts["professional_law"] == 11
    assert counts["moral_scenarios"] == 6
    assert counts["miscellaneous"] == 5
    assert counts["high_school_psychology"] == counts["professional_psychology"] == 4
    assert sorted(counts.values()).count(1) == 36
    again = mmlu.questions(Source(DATA), 1, 100)[0]
    assert again == drawn
    assert mmlu.questions(Source(DATA), 2, 100)[0] != drawn


@needs_data
def test_the_likeliest_letter_is_asked_for_after_five_examples_of_the_subject() -> None:
    drawn, _ = mmlu.questions(Source(DATA), 1, 3, mmlu.LOGPROB)
    for question in drawn:
        assert question.prompt.count("\nAnswer:") == 6
        assert question.prompt.endswith("\nAnswer:")
        assert not question.messages
