"""Which code is taken out of a reply, and what program is made of it."""

from __future__ import annotations

import pytest

from eval.data import Problem
from eval.execution import run_program
from eval.humaneval import program_of, prompt_of

PROBLEM = Problem(
    task_id="HumanEval/0",
    prompt='import math\n\n\ndef half(x):\n    """Half of x, rounded up."""\n',
    entry_point="half",
    canonical_solution="    return math.ceil(x / 2)\n",
    test="def check(candidate):\n    assert candidate(3) == 2\n",
)
BODY = "    return math.ceil(x / 2)\n"
WHOLE = "def half(x):\n    return math.ceil(x / 2)\n"
OTHER = "def other(x):\n    return x\n"


def fenced(code: str, tag: str = "python", fence: str = "```") -> str:
    return f"{fence}{tag}\n{code}{fence}\n"


RIGHT = {
    "the whole function in a block": fenced(WHOLE),
    "between words": f"Sure! Here it is:\n\n{fenced(WHOLE)}\nIt rounds up.\n",
    "no tag": fenced(WHOLE, ""),
    "another tag": fenced(WHOLE, "py3 title=a"),
    "another fence": fenced(WHOLE, "python", "~~~"),
    "a longer fence": fenced(WHOLE, "python", "`````"),
    "indented in a list": "1. So:\n   " + fenced(WHOLE).replace("\n", "\n   "),
    "windows lines": fenced(WHOLE).replace("\n", "\r\n"),
    "the first that defines it": fenced("pip install x\n", "sh") + fenced(OTHER) + fenced(WHOLE),
    "of two the first": fenced(WHOLE) + fenced("def half(x):\n    return None\n"),
    "imports and helpers beside it": fenced(f"import os\n\n{OTHER}\n{WHOLE}\nprint(half(4))\n"),
    "an import that must stand first": fenced(f"from __future__ import annotations\n\n{WHOLE}"),
    "a name that is given a function": fenced("half = lambda x: math.ceil(x / 2)\n"),
    "a block that was cut off": f"```python\n{WHOLE}\n\ndef ha",
    "a block with words in it": fenced(f"{WHOLE}\nThis function rounds up.\n"),
    "no block": WHOLE,
    "no block, words around": f"Here is the function:\n\n{WHOLE}\nIt rounds up.",
    "words that look like code ahead": f"from the text one sees:\n\n{WHOLE}",
    "the prompt said again": PROBLEM.prompt + BODY,
    "the body alone": BODY,
    "the body, blanks cut off": BODY.strip(),
    "the body, then words": f"{BODY}\nThat rounds up, as was asked.",
    "the body in a block": fenced(BODY),
    "the body, then another function": f"{BODY}\n\ndef main():\n    print(half(3",
    "after thoughts": f"<think>\n{fenced('def half(x): return None')}\n</think>\n{fenced(WHOLE)}",
    "after thoughts that the template began": f"{fenced('def half(x): 1')}</think>{fenced(WHOLE)}",
}


@pytest.mark.parametrize("reply", RIGHT.values(), ids=RIGHT)
def test_the_code_is_found_and_right(reply: str) -> None:
    program = program_of(PROBLEM, reply)
    assert program is not None
    names: dict[str, object] = {}
    exec(compile(program, "<program>", "exec"), names)  # a program is whole: it can be run as it is
    assert names["half"](3) == 2  # type: ignore[operator]


NOTHING = {
    "nothing": "",
    "blanks": " \n\n",
    "words": "I cannot help with that.",
    "one word": "Sure",
    "a comment": "# to be done\n",
    "a description": '    """It halves."""\n',
    "thoughts that were cut off": f"<think>\n{fenced(WHOLE)}",
    "another language": fenced("function half(x) { return Math.ceil(x / 2); }\n", "js"),
    "zero bytes": "\0" * 10,
    "open brackets": "(" * 5000,
}


@pytest.mark.parametrize("reply", NOTHING.values(), ids=NOTHING)
def test_no_code_is_found(reply: str) -> None:
    assert program_of(PROBLEM, reply) is None


def test_a_long_reply_is_judged_by_its_beginning() -> None:
    assert program_of(PROBLEM, "word word\n" * 20_000) is None
    assert program_of(PROBLEM, BODY + "word word\n" * 20_000) is not None


def test_what_a_reply_does_to_the_helpers_of_a_problem_is_not_used_to_judge_it() -> None:
    prompt = 'def twice(x):\n    return 2 * x\n\n\ndef half(x):\n    """Half of x."""\n'
    test = "def check(candidate):\n    assert candidate(twice(2)) == 2\n"
    problem = Problem("HumanEval/1", prompt, "half", "", test)
    wrong = "def twice(x):\n    return 4\n\ndef half(x):\n    return twice(x) // 2\n"
    program = program_of(problem, wrong)
    assert program is not None
    assert run_program(program).outcome == "passed"  # it may have a helper of that name itself
    program = program_of(problem, "def twice(x):\n    return 0\n\ndef half(x):\n    return 0\n")
    assert program is not None
    assert run_program(program).outcome == "failed"


def test_the_question_shows_the_problem_and_asks_for_a_block() -> None:
    assert prompt_of(PROBLEM).endswith(f"```python\n{PROBLEM.prompt.strip()}\n```")
