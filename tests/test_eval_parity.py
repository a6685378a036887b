"""The graders find in a reply what lm-evaluation-harness finds there.

tests/lm_eval_replies.json holds replies that its 0.4.13 logged, and what it extracted of
them; CONTRIBUTING.md says how it was made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import gsm8k, mmlu
from eval.task import Reply

REPLIES = json.loads(Path(__file__).with_name("lm_eval_replies.json").read_text(encoding="ascii"))
NOTHING = "[invalid]"  # what it calls a reply in which it finds none

SUMS = REPLIES["gsm8k"] + REPLIES["made"]  # replies of SmolLM2, and of our own

each_sum = pytest.mark.parametrize("row", SUMS, ids=lambda row: str(row["id"]))
each_choice = pytest.mark.parametrize("row", REPLIES["mmlu"], ids=lambda row: str(row["id"]))


def test_there_are_twenty_replies_of_each_and_some_that_are_right() -> None:
    assert (len(REPLIES["gsm8k"]), len(REPLIES["mmlu"])) == (20, 20)
    for name in ("strict-match", "flexible-extract"):
        assert {row["is_right"][name] for row in REPLIES["made"]} == {True, False}


@each_sum
def test_the_strict_number_is_the_same(row: dict[str, Any]) -> None:
    assert (gsm8k.strict(row["reply"]) or NOTHING) == row["extracted"]["strict-match"]


@each_sum
def test_the_flexible_number_is_the_same(row: dict[str, Any]) -> None:
    assert (gsm8k.flexible(row["reply"]) or NOTHING) == row["extracted"]["flexible-extract"]


@each_sum
def test_the_same_sums_are_right(row: dict[str, Any]) -> None:
    found = {
        "strict-match": gsm8k.is_right(gsm8k.strict(row["reply"]), row["gold"]),
        "flexible-extract": gsm8k.is_right(gsm8k.flexible(row["reply"]), row["gold"]),
    }
    assert found == row["is_right"]


@each_choice
def test_the_letter_is_the_same(row: dict[str, Any]) -> None:
    """The prompt of its generative task ends with `Answer:`, which the reply goes on."""
    reply = Reply(f"Answer:{row['reply']}", "stop")
    letter = mmlu.strict(reply.text)
    assert mmlu.flexible(reply) == letter, "what is strict is flexible too"
    assert mmlu.grade(reply, row["gold"]).more["strict"] == (letter == row["gold"])
    assert letter == row["extracted"]["get_response"]
    assert (letter == row["gold"]) == row["is_right"]["get_response"]
