"""Which option a reply to a multiple-choice question names, however it says so.

`flexible` would rather find nothing than something that was not meant. It goes by what is
called final, then by a statement ("The answer is D", "B is correct"), then by a letter that
heads the reply or its last line ("D. 4", "(D)", "D"). Where one of these names two letters
there is no answer, and what ranks below it is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from eval.data import LETTERS

OPTIONS = frozenset(LETTERS)

# What a letter, or all of a reply, may be dressed up in.
DRESS = re.compile(r"[*$`_}]|\\(?:boxed|text|textbf|mathrm|mathbf|mathbb)\{")

BOXED = re.compile(
    r"\\boxed\{[ \t]{0,3}(?:\\(?:text|textbf|mathrm|mathbf)\{)?[(\[]?([A-D])"
    r"(?:[)\].:][^{}\n]*|[ \t]{0,3})\}"
)

# One letter, or some: "B", "(B)", "B or C", "A, B, and C".
ONE = r"(?<![\w'])[(\[]?[A-H][)\]]?(?![\w'\u2019-])"
SOME = (
    rf"({ONE}(?:[ \t]{{0,3}}(?:,[ \t]?(?:and|or)\b|,|/|&|\band\b|\bor\b|\bnor\b)[ \t]{{0,3}}"
    rf"(?:option[ \t]|choice[ \t])?{ONE}){{0,3}})"
)
# The dot after an initial ("D. H. Lawrence", "A.D. 70") is none after an option.
DOT = r"\.(?!\w|[ \t]?[A-Z]\.)"
STATED = rf"(?:$|{DOT}|[,;:!\"'\u201d\u2013\u2014-]|(?:because|since|as|for)\b)"
SAID_OF = re.compile(
    r"\b(?i:answer(?:[ \t](?:choice|option|letter))?|(?:correct|right|best)[ \t](?:option|choice))"
    r"[ \t]{0,3}(?i:is|would be|must be|should be|:)[ \t]{0,3}:?[ \t]{0,3}"
    r"(?i:(?:either|the|option|choice|letter)[ \t]){0,3}[\"'\u201c]?"
    rf"{SOME}(?:(?<=[)\]])|(?=[ \t]{{0,3}}{STATED}))",
    re.MULTILINE,
)
IS_RIGHT = re.compile(
    rf"{SOME}[ \t](?:is|are)[ \t](?:the[ \t])?(?:correct|right|best)"
    r"(?:[ \t](?:answers?|options?|choices?)\b|(?=[ \t]{0,3}(?:[.,;!]|$)))",
    re.MULTILINE,
)
FINAL = re.compile(r"\bfinal[ \t]{1,3}$", re.IGNORECASE)

# Said of an answer in the same breath, these mean that it is not given, or not the right one.
DOUBT = re.compile(
    r"(?i)\b(?:if|whether|suppos\w+|assum\w+|unless|not|never|cannot|wrong|incorrect|false|bad"
    r"|an?other|some|many|students?|people|might|may)\b|n['\u2019]t\b"
)
BREATH = re.compile(r"[.,;:!?\n]")
ASKED = re.compile(r"[^.!?\n]*\?")
# An option of a case in law may well begin with "No, because".
TAKEN_BACK = re.compile(
    r"\b(?:(?i:wait|actually|correction|sorry|mistaken?|second thoughts?)\b|no,|No, it\b)"
)

NEAR_CHARS = 1000  # all that is looked at around a statement

# "D. 4", "(D) 4", "D: 4", "D"; but "A:" may stand for "answer".
LABEL = re.compile(
    rf"(?:(?i:option|choice|letter)[ \t])?[(\[]?([A-H])(?:[)\]]|(?<!A):|{DOT}|[ \t]{{0,3}}$)"
)
DENIED = re.compile(
    r"(?i)[ \t]?(?:is|was|are|can|could|would|must|seems)[ \t]?(?:n['\u2019]t|not|"
    r"wrong|incorrect|false|unlikely|impossible)\b"
)
# Other options beside it make it a list, or a choice that is not made.
NAMED = re.compile(
    rf"(?<![^\s(\[,;/])(?:[(\[]([A-H])[)\]]|([A-H])(?:[):]|{DOT}(?=[ \t]+\w)))"
    r"|(?:\b(?i:or|and|nor|not|but|be|is|than|option|choice|letter|answer)[ \t]|[/&][ \t]?)"
    r"([A-H])(?![\w'\u2019-])"
)
REFUSED = re.compile(
    r"\b(?:not|\w+n['\u2019]t)[ \t](?:option[ \t]|choice[ \t])?[(\[]?[A-H](?!\w)"
    r"|\b(?:not|\w+n['\u2019]t)[ \t](?:the[ \t])?(?:correct|right|best|answer)\b"
)
HEADING = re.compile(r"(?i)(?:(?:the|my)[ \t])?(?:\w+[ \t])?answer(?:[ \t]is)?[ \t]{0,3}:?")


def flexible(text: str, *, is_cut: bool = False) -> str | None:
    """The letter, from A to D; None where none is named, or more than one.

    With `is_cut` nothing is read of the sentence that was cut off, nor a mere letter at the
    head: what follows it may have been the other options.
    """
    if is_cut:
        text = text[: max(text.rfind(mark) for mark in ".!\n") + 1]
    plain = DRESS.sub("", text)
    stated = list(_stated(plain))
    final = {match[1] for match in BOXED.finditer(text)}
    final.update(*(letters for letters, is_final in stated if is_final))
    for found in (
        final,
        set().union(*(letters for letters, _ in stated)),
        set() if is_cut else _labelled(plain),
    ):
        if found:
            return found.pop() if len(found) == 1 and found <= OPTIONS else None
    return None


def _stated(plain: str) -> Iterator[tuple[set[str], bool]]:
    """The letters of each statement of an answer, and whether it is called the final one."""
    taken_back = max((match.end() for match in TAKEN_BACK.finditer(plain)), default=0)
    for pattern in (SAID_OF, IS_RIGHT):
        for match in pattern.finditer(plain, taken_back):
            before = plain[max(0, match.start() - NEAR_CHARS) : match.start()]
            after = plain[match.end() : match.end() + NEAR_CHARS]
            letters = set(re.findall(r"[A-H](?!\w)", match[1]))
            *_, breath = BREATH.split(before)
            is_meant = not (
                DOUBT.search(breath) or ASKED.match(after) or _goes_on_as_a_list(after, letters)
            )
            if is_meant:
                yield letters, bool(FINAL.search(before))


def _goes_on_as_a_list(after: str, letters: set[str]) -> bool:
    """Whether the next line is the option that follows: then all of them are being told."""
    lines = [line.strip() for line in after.splitlines()[1:] if line.strip()]
    label = LABEL.match(lines[0]) if lines else None
    return label is not None and chr(ord(label[1]) - 1) in letters


def _labelled(plain: str) -> set[str]:
    """The letter at the head of the reply or of its last line, and those named beside it."""
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    lines = [line for line in lines if not HEADING.fullmatch(line)]
    heads = {letter for line in lines[:1] + lines[-1:] if (letter := _label(line))}
    if not heads or TAKEN_BACK.search(plain) or REFUSED.search(plain):
        return set()
    others = {letter for line in lines[1:-1] if (letter := _label(line))}
    named = {next(filter(None, match.groups())) for match in NAMED.finditer(plain)}
    return heads | others | named


def _label(line: str) -> str | None:
    match = LABEL.match(line)
    return match[1] if match and not DENIED.match(line, match.end()) else None
