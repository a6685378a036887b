"""What counts as an answer to MMLU, what is asked, and which questions are drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# --- the flexible reading

# (reply, the letter), where the strict reading finds none; "" is no letter
NAMED = [
    # a letter heads the reply
    ("D. 4", "D"),
    ("D) 4", "D"),
    ("D: 4", "D"),
    ("(D) 4", "D"),
    ("[D] 4", "D"),
    ("D", "D"),
    (" D \n", "D"),
    ("(D)", "D"),
    ("D.", "D"),
    ("**D**", "D"),
    ("**D. 4**", "D"),
    ("**(D)** 4", "D"),
    ("`D`", "D"),
    ("Option D: 4", "D"),
    ("D. 4\n\nFour is the sum of two and two.", "D"),
    ("D\n\nFour is the sum of two and two.", "D"),
    ("A. Smith", "A"),  # of a name's initial nothing tells it apart
    ("C. Vitamin D", "C"),
    ("A. No, because both were mistakenly sued.", "A"),
    ("A. Wrong, Wrong", "A"),
    ("C. Not wrong, Not wrong", "C"),
    ("D. too little, by a factor of 25 (at 20 °C)", "D"),
    # or its last line
    ("Two and two make four.\n\nD", "D"),
    ("Two and two make four.\n**D. 4**", "D"),
    ("Two and two make four.\n(D)", "D"),
    ("Answer:\nD", "D"),
    ("**Answer**:\n\nD. 4", "D"),
    ("The answer is:\n\n(D) 4", "D"),
    ("Answer:\n\nD. 4\n\nFour is the sum of two and two.", "D"),
    # a statement
    ("The answer is D", "D"),
    ("The answer is D.", "D"),
    ("The answer is D. the empowerment of Congress", "D"),
    ("the answer is: D", "D"),
    ("The correct answer is (D) 4.", "D"),
    ("The correct answer is **D**: 4", "D"),
    ("The correct option is D because two and two make four", "D"),
    ("So the answer must be option D.", "D"),
    ("The answer would be letter D", "D"),
    ("The best choice is D, not C.", "D"),
    ("A good answer is C", "C"),
    ("B is correct.", "B"),
    ("Option B is the right answer", "B"),
    ("I think (B) is the correct choice here.", "B"),
    ("A comet falls. The answer is B.", "B"),
    ("A. I only\nB. II only\nC. both\nD. none\n\nThe answer is C.", "C"),
    ("A is wrong: it is cold. B is wrong too. The answer is C.", "C"),
    ("A. I only\n\nThe answer is A. I only", "A"),
    ("The answer is C. Some say that the answer is B.", "C"),
    # what is called final
    ("$\\boxed{B}$", "B"),
    ("so \\boxed{\\text{B}} it is", "B"),
    ("\\boxed{(B)}", "B"),
    ("\\boxed{B. 4}", "B"),
    ("The answer is A. Or not. The final answer is B.", "B"),
    ("The answer is A, or so it seems: $\\boxed{B}$", "B"),
    # words and sentences that begin with these letters
    ("Dear", ""),
    ("Dear Sir, D is a letter", ""),
    ("A 12-ounce soft drink has 41 grams of sugar.", ""),
    ("A good question", ""),
    ("Both", ""),
    ("Because of A", ""),
    ("D-day", ""),
    ("A's", ""),
    ("A.D. 70", ""),
    ("C. S. Lewis wrote it", ""),
    ("The answer is C. S. Lewis", ""),
    ("B12", ""),
    ("C++", ""),
    ("C#", ""),
    ("a. 4", ""),
    ("A: two and two make four", ""),  # A as in "answer"
    ("E. Multiple sclerosis", ""),
    ("The answer is A good one", ""),
    ("The answer is a matter of taste.", ""),
    ("The answer is A.D. 70", ""),
    ("The answer is E.", ""),
    ("C is the best way to do it.", ""),
    ("X\n", ""),
    ("True, False", ""),
    ("\\boxed{A + B}", ""),
    ("\\boxed{Both}", ""),
    # two letters, and no word on which
    ("B or C", ""),
    ("B. or C.", ""),
    ("(B) or (C)", ""),
    ("B, C", ""),
    ("B/C", ""),
    ("The answer is B or C", ""),
    ("The answer is either B or C.", ""),
    ("The answer is B, C.", ""),
    ("The answer is B and C.", ""),
    ("The answer is (B) / (C)", ""),
    ("Both B and C are correct.", ""),
    ("Neither B nor C is correct.", ""),
    ("The answer is B. The answer is C.", ""),
    ("D. 4\n\nThe answer is B. The answer is C.", ""),
    ("$\\boxed{B}$ or $\\boxed{C}$", ""),
    ("\\boxed{B or C}", ""),
    ("\\boxed{B}\nThe final answer is C.", ""),
    ("A. 28\nB. 21\nC. 40\nD. 30", ""),
    ("IBS\nA. is a problem\nB. is none", ""),
    ("Principles are A. Confidentiality, B. Integrity", ""),
    ("A. Confidentiality, B. Integrity", ""),
    ("D. 4\nE. 5", ""),
    ("D. 4\n\nC. 3", ""),
    ("D\nC\nEither will do.", ""),
    ("B. 4 is wrong, so it must be C", ""),
    ("The answer is:\nA. I only\nB. II only", ""),
    ("The answer is A. I only\nB. II only\nC. both", ""),
    # a letter that is not meant
    ("The answer is not D.", ""),
    ("The answer isn't D.", ""),
    ("It is not true that the answer is D.", ""),
    ("The wrong answer is D.", ""),
    ("An incorrect answer is D.", ""),
    ("If the answer is D, pigs fly.", ""),
    ("Some say the answer is D.", ""),
    ("Is the answer D?", ""),
    ("The answer is D?", ""),
    ("Can it be that the answer is D, then?", ""),
    ("(D) is wrong.", ""),
    ("(D) isn't it.", ""),
    ("D is not correct.", ""),
    ("D. 4 is not the answer.", ""),
    ("D. 4\n\nThe answer is not D.", ""),
    ("D. 4\n\nIt cannot be, it isn't D.", ""),
    ("D. 4. Wait, that is too much.", ""),
    ("The answer is D. Wait, it is B.", ""),
    ("The answer is D. No, it is B.", ""),
    ("You've already answered the question.", ""),
    ("Answer: X, where X is A, B, C or D", ""),
    ("The form is one line, where X is A, B, C or D:\nAnswer: X", ""),
    ("", ""),
]


def named(text: str, finish_reason: str = "stop") -> str:
    return mmlu.flexible(Reply(text, finish_reason)) or ""


@pytest.mark.parametrize(("text", "letter"), NAMED)
def test_a_letter_is_read_however_it_is_named(text: str, letter: str) -> None:
    assert mmlu.strict(text) is None
    assert named(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("D. 4", ""),  # the other options may have been to come
        ("D", ""),
        ("D. 4\n\nFour is the sum", ""),
        ("The answer is D", ""),  # or Denmark
        ("The answer is B or", ""),
        ("The answer is D. It is", "D"),
        ("The answer is D.\nIt is", "D"),
        ("\\boxed{D}\nIt is", "D"),
        ("Answer: D", "D"),
        ("<think>The answer is D. It is", ""),
    ],
)
def test_of_a_reply_that_was_cut_off_only_whole_sentences_count(text: str, letter: str) -> None:
    assert named(text, "length") == letter


def test_thoughts_name_nothing() -> None:
    assert named("<think>The answer is A.</think>D. 4") == "D"
    assert named("<think>The answer is A.</think>") == ""


def test_both_readings_are_recorded_and_the_outcome_is_the_strict_one() -> None:
    for text, outcome, answer, more in (
        ("Answer: B", CORRECT, "B", (True, True, "B")),
        ("B. x", NO_ANSWER, None, (False, True, "B")),
        ("C. x", NO_ANSWER, None, (False, False, "C")),
        ("Answer: C\nThe final answer is B.", WRONG, "C", (False, False, "C")),
        ("Dear", NO_ANSWER, None, (False, False, None)),
    ):
        grade = mmlu.grade(Reply(text, "stop"), "B")
        assert (grade.outcome, grade.answer) == (outcome, answer)
        assert tuple(grade.more[key] for key in ("strict", "flexible", "flexible_answer")) == more


WAYS = (
    "{0}. 4",
    "({0}) 4",
    "**{0}**",
    "{0}",
    "The answer is {0}.",
    "The correct answer is ({0}).",
    "Option {0} is correct.",
    "$\\boxed{{{0}}}$",
    "Well,\n\n{0}",
)
TWO = ("{0} or {1}", "{0}. or {1}.", "The answer is {0} or {1}.", "({0})\n({1})", "{0}. x\n{1}. y")
four = st.sampled_from("ABCD")
# Words in which no option is named: what may stand around an answer.
prose = st.lists(
    st.sampled_from("the cold stone falls so far and then Dear Both Add Cat rests on 4".split()),
    max_size=30,
).map(" ".join)


@given(st.sampled_from(WAYS), four)
def test_every_letter_is_read_alike(way: str, letter: str) -> None:
    assert named(way.format(letter)) == letter


@given(st.sampled_from(TWO), st.permutations("ABCD"))
def test_of_two_letters_none_is_taken(way: str, letters: list[str]) -> None:
    assert named(way.format(*letters)) == ""


@given(prose, four, prose)
def test_prose_around_a_statement_changes_nothing(before: str, letter: str, after: str) -> None:
    assert named(f"{before}.\nThe answer is {letter}. {after}") == letter
    assert named(f"{before}\n{after}") == ""


@given(st.permutations("ABCD"), st.lists(st.sampled_from(["x", "y z", "1.5"]), min_size=4))
def test_a_list_of_the_options_is_no_answer_in_any_order(
    order: list[str], texts: list[str]
) -> None:
    lines = [f"{letter}. {text}" for letter, text in zip(order, texts, strict=False)]
    assert named("\n".join(lines)) == ""
    assert named(", ".join(lines)) == ""


@given(st.text("ABCDE abcd.,:;()[]*$\\{}?!\n'oris\u2019"), st.sampled_from(["stop", "length"]))
def test_any_text_is_read_and_what_is_strict_stays_so(text: str, finish_reason: str) -> None:
    reply = Reply(text, finish_reason)
    assert mmlu.flexible(reply) in {None, *"ABCD"}
    answered = Reply(f"Answer: B\n{text}", finish_reason)
    assert mmlu.flexible(answered) == mmlu.strict(answered.visible) == "B"


@given(st.text(st.characters(exclude_characters="ABCDabcd")))
def test_where_no_such_letter_is_none_is_read(text: str) -> None:
    assert named(text) == ""


LONG = ["answer is ", "A, ", "the answer is A or ", "(", "\n", "if A ", "The answer is not A.\n"]


@pytest.mark.parametrize("text", LONG)
def test_a_long_reply_is_read_soon(text: str) -> None:
    """A pattern that goes back over all it has read would take hours here."""
    assert named(text * (100_000 // len(text)) + " " * 100_000) == ""
