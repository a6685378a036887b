"""What the benchmarks have in common: questions, outcomes, and replies without their thoughts."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.client import Answer

NAME = "llama-sidecar-eval"

# How a question can end. Only the first two are judgements of what the model said.
CORRECT = "correct"
WRONG = "wrong"
NO_ANSWER = "no_answer"  # it said something, but nothing that can be taken for an answer
TRUNCATED = "truncated"  # the budget of tokens ended before the answer
EMPTY = "empty"  # it said nothing, thoughts aside
ERROR = "error"  # the server gave no reply: asked again, never counted as wrong
UNSCORED = "unscored"  # HumanEval: there is a program, whose verdict is in another file
OUTCOMES = (CORRECT, WRONG, NO_ANSWER, TRUNCATED, EMPTY, ERROR)

_TAGS = "think|thinking|thought|thoughts|reasoning|reflection"
_THOUGHT = re.compile(rf"<({_TAGS})>.*?</\1>|\[THINK\].*?\[/THINK\]", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]", re.IGNORECASE)
_THOUGHT_BEGIN = re.compile(rf"<(?:{_TAGS})>|\[THINK\]", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Question:
    """`messages` for a chat, or `prompt` for a plain completion."""

    id: str
    gold: str
    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Grade:
    """`more` are fields of the record beside these two."""

    outcome: str
    answer: str | None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What is stored of an answer, and all that a grader sees."""

    text: str
    finish_reason: str
    tokens: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of_answer(cls, answer: Answer) -> Reply:
        return cls(answer.reply, answer.finish_reason, answer.tokens)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Reply:
        tokens = tuple((token, logprob) for token, logprob in record.get("tokens", ()))
        return cls(record["reply"], record["finish_reason"], tokens)

    @property
    def visible(self) -> str:
        """Without blocks of thoughts, also one that was cut off or begun by the template."""
        return without_thoughts(self.text).strip()

    @property
    def is_cut(self) -> bool:
        return self.finish_reason == "length"

    def without_answer(self) -> str:
        """The outcome where no answer is found."""
        if self.is_cut:
            return TRUNCATED
        return NO_ANSWER if self.visible else EMPTY


def without_thoughts(text: str) -> str:
    """What is left keeps the blanks around it: they may mean something in code."""
    text = _THOUGHT.sub("", text)
    *_, text = _THOUGHT_END.split(text)
    return _THOUGHT_BEGIN.split(text)[0]


def sample(task: str, seed: int, rows: int, limit: int | None) -> Sequence[int]:
    """Which of so many rows are asked, in their order; the same on every machine."""
    if limit is None or limit >= rows:
        return range(rows)
    return sorted(random.Random(f"{NAME}/{task}/{seed}").sample(range(rows), limit))


def allocated(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many of each group make up `limit`, in proportion: by the largest remainder.

    Of equal remainders the first name's counts. Groups with none are left out.
    """
    total = sum(sizes.values())
    limit = min(limit, total)
    counts = {name: limit * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(limit * sizes[name] % total), name))
    for name in by_remainder[: limit - sum(counts.values())]:
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}
