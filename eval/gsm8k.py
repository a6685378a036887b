"""GSM8K: school mathematics in words, answered after some thought.

Both published numbers are taken from each reply: strict asks for the line `#### N`, and
flexible for the right number at the end. Patterns and the cleaning of numbers are those of
lm-evaluation-harness (tasks/gsm8k, version 3), so that scores compare.
"""

from __future__ import annotations

import re

from eval.data import GSM8K, Source
from eval.task import CORRECT, WRONG, Grade, Question, Reply, sample

NAME = "gsm8k"
PROMPT_VERSION = "gsm8k-chat-2"
GRADER_VERSION = "gsm8k-1"
DEFAULT_LIMIT = 50

PROMPT = """\
Solve this problem step by step. Then end with one last line that holds nothing but #### \
and the answer as a plain number.

Problem: {question}"""

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

IGNORED = tuple(re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"))


def questions(source: Source, seed: int, limit: int | None) -> tuple[list[Question], str]:
    """Those drawn, and the sum of the data. Raises DataError."""
    rows = source.gsm8k()
    drawn = [rows[index] for index in sample(NAME, seed, len(rows), limit)]
    asked = [_question(f"{NAME}/{row.index}", row.question, row.gold) for row in drawn]
    return asked, GSM8K.sha256


def _question(name: str, text: str, gold: str) -> Question:
    content = PROMPT.format(question=text)
    return Question(name, gold, messages=({"role": "user", "content": content},))


def strict(text: str) -> str | None:
    """The first number that stands after ####; None if there is none."""
    match = STRICT.search(text)
    return match[1] if match else None


def flexible(text: str) -> str | None:
    """The last number of all."""
    found = FLEXIBLE.findall(text)
    return next(filter(None, found[-1])) if found else None


def normal(number: str) -> str:
    """As two numbers are compared: without commas, dollar signs and a dot at the end."""
    for ignored in IGNORED:
        number = ignored.sub("", number)
    return number


def is_right(number: str | None, gold: str) -> bool:
    return number is not None and normal(number).lower() == normal(gold).lower()


def grade(reply: Reply, gold: str) -> Grade:
    """The outcome is by the flexible number; `strict` and `flexible` say which were right.

    The last number of a reply that was cut off ahead of its #### line is no answer.
    """
    text = reply.visible
    marked = strict(text)
    found = None if reply.is_cut and marked is None else flexible(text)
    more = {"strict": is_right(marked, gold), "flexible": is_right(found, gold)}
    if found is None or not any(map(str.isdigit, found)):  # the last "number" may be three dots
        return Grade(reply.without_answer(), None, more)
    return Grade(CORRECT if more["flexible"] else WRONG, normal(found), more)
