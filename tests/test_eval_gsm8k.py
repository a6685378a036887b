"""What counts as an answer to GSM8K, and what is made of all other replies."""

from __future__ import annotations

import pytest

from eval import gsm8k
from eval.data import Source
from eval.task import CORRECT, EMPTY, NO_ANSWER, TRUNCATED, WRONG, Reply
from tests.eval_parts import DATA, needs_data

# (reply, finish_reason, outcome, answer, strict, flexible) where 18 is right
REPLIES = [
    ("She makes 9 * 2 = 18.\n#### 18", "stop", CORRECT, "18", True, True),
    ("#### 18", "stop", CORRECT, "18", True, True),
    ("#### 18.", "stop", CORRECT, "18", True, True),
    ("#### $18", "stop", CORRECT, "18", False, True),
    ("#### 18.00", "stop", WRONG, "18.00", False, False),  # as in lm-evaluation-harness
    ("####18", "stop", CORRECT, "18", False, True),
    ("**#### 18**", "stop", CORRECT, "18", True, True),
    ("#### 17", "stop", WRONG, "17", False, False),
    ("#### -18", "stop", WRONG, "-18", False, False),
    ("#### 1,8", "stop", CORRECT, "18", True, True),
    ("The answer is 18", "stop", CORRECT, "18", False, True),
    ("The answer is $18.", "stop", CORRECT, "18", False, True),
    ("\\boxed{18}", "stop", CORRECT, "18", False, True),
    ("16 - 3 - 4 = 9", "stop", WRONG, "9", False, False),
    ("#### 18\nThat is for 2 days", "stop", WRONG, "2", True, False),
    ("#### 17\n#### 18", "stop", CORRECT, "18", False, True),  # strict takes the first
    ("Eighteen dollars", "stop", NO_ANSWER, None, False, False),
    ("I wonder...", "stop", NO_ANSWER, None, False, False),
    ("", "stop", EMPTY, None, False, False),
    (" \n\t", "stop", EMPTY, None, False, False),
    ("", "length", TRUNCATED, None, False, False),
    ("16 - 3 = 13, and 13 + 5 = 18", "length", TRUNCATED, None, False, False),
    ("#### 18\n\nProblem: Tom has", "length", CORRECT, "18", True, True),
    ("<think>#### 18</think>", "stop", EMPTY, None, False, False),
    ("<think>it is 18</think>#### 17", "stop", WRONG, "17", False, False),
    ("<think>it is 17</think>#### 18", "stop", CORRECT, "18", True, True),
    ("<think>#### 18", "length", TRUNCATED, None, False, False),
    ("<think>#### 18", "stop", EMPTY, None, False, False),
    ("it is 17</think>\n#### 18", "stop", CORRECT, "18", True, True),  # begun by the template
    ("#### 18</think>", "stop", EMPTY, None, False, False),
    ("<THINK>17</THINK>#### 18<think>#### 3", "length", CORRECT, "18", True, True),
    ("[THINK]17[/THINK]#### 18", "stop", CORRECT, "18", True, True),
    ("<think>a<think>b</think>#### 18", "stop", CORRECT, "18", True, True),
    ("#### ١٨", "stop", NO_ANSWER, None, False, False),
    ("#### 18\u2028#### 17", "stop", WRONG, "17", True, False),
]


@pytest.mark.parametrize(
    ("text", "finish_reason", "outcome", "answer", "strict", "flexible"), REPLIES
)
def test_a_reply_is_graded(
    text: str, finish_reason: str, outcome: str, answer: str | None, strict: bool, flexible: bool
) -> None:
    grade = gsm8k.grade(Reply(text, finish_reason), "18")
    assert (grade.outcome, grade.answer) == (outcome, answer)
    assert grade.more == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1,234,567", "1,234,567", "1,234,567"),
        ("#### -5", "-5", "-5"),
        ("#### 3.5 apples", "3.5", "3.5"),
        ("it costs $4.50.", None, "$4.50."),
        ("5", None, "5"),
        ("none", None, None),
        ("so ...", None, "..."),
        ("#### .", ".", None),
    ],
)
def test_numbers_are_found_as_lm_evaluation_harness_finds_them(
    text: str, strict: str | None, flexible: str | None
) -> None:
    assert (gsm8k.strict(text), gsm8k.flexible(text)) == (strict, flexible)


@pytest.mark.parametrize(
    ("number", "normal"),
    [("1,234", "1234"), ("$18.", "18"), ("18.,", "18"), ("a\n#### 7", "7"), ("1.5", "1.5")],
)
def test_numbers_are_made_alike(number: str, normal: str) -> None:
    assert gsm8k.normal(number) == normal


@needs_data
def test_every_published_answer_is_right_by_both_measures() -> None:
    rows = Source(DATA).gsm8k()
    grades = [gsm8k.grade(Reply(row.answer, "stop"), row.gold) for row in rows]
    assert sum(grade.more["strict"] for grade in grades) == 1319
    assert sum(grade.more["flexible"] for grade in grades) == 1319
    assert {grade.outcome for grade in grades} == {CORRECT}


@needs_data
def test_answers_that_are_wrong_by_one_are_never_right() -> None:
    for row in Source(DATA).gsm8k():
        grade = gsm8k.grade(Reply(f"#### {int(row.gold) + 1}", "stop"), row.gold)
        assert (grade.outcome, grade.more["strict"]) == (WRONG, False)


@needs_data
def test_a_draw_is_the_same_everywhere_and_another_seed_draws_others() -> None:
    drawn, sha256 = gsm8k.questions(Source(DATA), 1, 5)
    ids = ["gsm8k/89", "gsm8k/118", "gsm8k/386", "gsm8k/956", "gsm8k/1016"]
    assert [question.id for question in drawn] == ids
    assert sha256.startswith("3730d312")
    others = gsm8k.questions(Source(DATA), 2, 5)[0]
    assert {question.id for question in others}.isdisjoint(ids)
    assert len(gsm8k.questions(Source(DATA), 1, None)[0]) == 1319
