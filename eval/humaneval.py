"""HumanEval: Python functions to be written from their signature and description.

A reply becomes one program: the problem with the reply's code in it, and the check. Running
it is another matter: see execution.py.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

from eval.data import Problem
from eval.execution import with_check
from eval.task import without_thoughts

NAME = "humaneval"
PROMPT_VERSION = "humaneval-chat-1"
GRADER_VERSION = "humaneval-1"  # of how code is found in a reply
DEFAULT_LIMIT = 164

PROMPT = """\
Complete this Python function. Reply with one code block that holds the whole function, its \
signature included, and every import that it needs.

```python
{prompt}
```"""

FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[^`\n]*\n")
CODE_BEGINS = re.compile(r"(?m)^(?:(?:def|class|import|from)\b|@)")
MOST_LINES = 1000  # of a reply; no answer is as long
MOST_STARTS = 10


def prompt_of(problem: Problem) -> str:
    """What the user says."""
    return PROMPT.format(prompt=problem.prompt.strip())


def program_of(problem: Problem, reply: str) -> str | None:
    """The program to run; None if the reply holds no code that could be a part of it.

    Of the fenced blocks, whatever their tags, the first that defines the function; else
    the longest beginning that compiles, first of a block and then of the reply. Thoughts
    are not searched.
    """
    text = without_thoughts(reply)
    blocks = [textwrap.dedent(block) for block in _blocks(text)]
    for block in blocks:
        if _defines(block, problem.entry_point):
            return assembled(problem, block)
    for part in (*_blocks(text), text):
        for start in _starts(part):
            code = _longest(problem, part[start:])
            if code:
                return assembled(problem, code)
    return None


def assembled(problem: Problem, code: str) -> str:
    """The problem with this code in it, either the whole function or its body, and the check."""
    return with_check(_solution(problem, code), _check(problem), problem.entry_point)


def _solution(problem: Problem, code: str) -> str:
    """The prompt stays above, for its imports and helpers."""
    if not _defines(code, problem.entry_point):
        return _with_newline(problem.prompt) + code
    below = f"{_with_newline(problem.prompt)}    pass\n\n\n{code}"
    return below if _parsed(below) else code  # `from __future__` has to stand first


def _check(problem: Problem) -> str:
    """What judges: the helpers of the problem, which the reply may have changed, and the test."""
    tree = _parsed(_with_newline(problem.prompt) + "    pass\n")
    lines = problem.prompt.splitlines(keepends=True)
    helpers = [
        "".join(lines[node.lineno - 1 : node.end_lineno])
        for node in (tree.body if tree else [])
        if getattr(node, "name", None) != problem.entry_point
    ]
    return "".join(
        [*helpers, "\n\n", _with_newline(problem.test), f"check({problem.entry_point})\n"]
    )


def _blocks(text: str) -> Iterator[str]:
    """What stands in fences, the last of which may be missing."""
    block: list[str] | None = None
    fence = ""
    for line in text.splitlines(keepends=True):
        if block is None:
            opening = FENCE.fullmatch(_with_newline(line))
            if opening:
                block, fence = [], opening[1]
        elif line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            yield "".join(block)
            block = None
        else:
            block.append(line)
    if block:
        yield "".join(block)


def _starts(text: str) -> list[int]:
    """Where code may begin: at once, or behind some words."""
    return [0, *(begins.start() for begins in CODE_BEGINS.finditer(text))][:MOST_STARTS]


def _longest(problem: Problem, text: str) -> str | None:
    """The longest beginning, in lines, that completes the problem; None if there is none."""
    lines = text.splitlines(keepends=True)[:MOST_LINES]
    for end in range(len(lines), 0, -1):
        code = "".join(lines[:end])
        for variant in (code, "    " + code):  # who cuts blanks off a reply cuts off this one
            if _says_something(problem, variant):
                return variant
    return None


def _says_something(problem: Problem, code: str) -> bool:
    """Whether it compiles in its place, and gives the function a body."""
    if _defines(code, problem.entry_point):
        return True
    tree = _parsed(_with_newline(problem.prompt) + code)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point:
            return not _is_mere_word(node.body[-1])
    return False


def _is_mere_word(node: ast.stmt) -> bool:
    """A description, or the first word of a sentence: that compiles as well."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Name)


def _defines(code: str, name: str) -> bool:
    """Whether the name is bound to a function, or to anything, at the top of this code."""
    tree = _parsed(code)
    return tree is not None and any(name in _bound(node) for node in tree.body)


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _parsed(code: str) -> ast.Module | None:
    """None if it does not compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in strings, which are the model's
        try:
            tree = ast.parse(code)
            compile(code, "<reply>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return None
    return tree


def _with_newline(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
