"""MMLU: multiple choice over 57 subjects.

As a chat (zero-shot, thinking aloud, a last line `Answer: X`), or with --mode logprob as
the original did: five examples, and the likeliest letter for the next token.

A chat's reply is read twice: strict takes the line that was asked for and nothing else,
and flexible (eval/letters.py) also what names a letter in other words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from eval import letters, task
from eval.data import LETTERS, Choice, Mmlu, Source
from eval.task import CORRECT, WRONG, Grade, Question, Reply, allocated

NAME = "mmlu"
CHAT = "chat"
LOGPROB = "logprob"
MODES = (CHAT, LOGPROB)
PROMPT_VERSION = "mmlu-chat-1"
LOGPROB_PROMPT_VERSION = "mmlu-logprob-1"
GRADER_VERSION = "mmlu-2"
DEFAULT_LIMIT = 100
SHOTS = 5
CANDIDATES = 40  # tokens among which the letters are looked for

PROMPT = """\
Answer this multiple choice question about {subject}. Think first, briefly. Then end with one \
last line of exactly this form, where X is A, B, C or D:
Answer: X

{stem}"""
HEADING = "The following are multiple choice questions (with answers) about {subject}.\n\n"

# Models dress the letter up: **Answer:** B, Answer: $\boxed{B}$, Answer: (B).
DRESS = re.compile(r"[*$`]|\\(?:boxed|text|mathrm|mathbf)\{")
# simple-evals' pattern; but `Answer: Both` is not B.
MARKED = re.compile(r"(?i)Answer[ \t]*:[ \t]*[(\[]?([A-D])(?!\w)")


def questions(
    source: Source, seed: int, limit: int | None, mode: str = CHAT
) -> tuple[list[Question], str]:
    """Those drawn, in proportion over the subjects, and the sum of the data. Raises DataError."""
    data = source.mmlu()
    drawn = [choice for subject in data.test for choice in _drawn(data, subject, seed, limit)]
    asked = [chat_question(one) for one in drawn]
    if mode == LOGPROB:
        asked = [logprob_question(one, data.dev[one.subject][:SHOTS]) for one in drawn]
    return asked, data.sha256()


def _drawn(data: Mmlu, subject: str, seed: int, limit: int | None) -> list[Choice]:
    rows = data.test[subject]
    if limit is None:
        return rows
    sizes = {name: len(choices) for name, choices in data.test.items()}
    count = allocated(sizes, limit).get(subject, 0)
    draw = random.Random(f"{task.NAME}/{NAME}/{seed}/{subject}")
    return [rows[index] for index in sorted(draw.sample(range(len(rows)), count))]


def chat_question(choice: Choice) -> Question:
    content = PROMPT.format(subject=_spelled(choice.subject), stem=_stem(choice))
    message = {"role": "user", "content": content}
    return Question(_id(choice), choice.gold, messages=(message,))


def logprob_question(choice: Choice, shots: Sequence[Choice]) -> Question:
    """The prompt of the original; it ends where a letter, after a blank, has to come."""
    examples = [f"{_stem(shot)}\nAnswer: {shot.gold}\n\n" for shot in shots]
    heading = HEADING.format(subject=_spelled(choice.subject))
    prompt = heading + "".join(examples) + f"{_stem(choice)}\nAnswer:"
    return Question(_id(choice), choice.gold, prompt=prompt)


def _id(choice: Choice) -> str:
    return f"{NAME}/{choice.subject}/{choice.index}"


def _spelled(subject: str) -> str:
    return subject.replace("_", " ")


def _stem(choice: Choice) -> str:
    lettered = zip(LETTERS, choice.choices, strict=True)
    return "\n".join([choice.question, *(f"{letter}. {text}" for letter, text in lettered)])


def strict(text: str) -> str | None:
    """The letter of the first `Answer: X`; None if there is none."""
    match = MARKED.search(DRESS.sub("", text))
    return match[1].upper() if match else None


def flexible(reply: Reply) -> str | None:
    """What `strict` reads, and where that is nothing, a letter named in other words."""
    text = reply.visible
    return strict(text) or letters.flexible(text, is_cut=reply.is_cut)


def likeliest(tokens: Sequence[tuple[str, float]]) -> str | None:
    """The letter with the best token, with or without a blank ahead; None if none is there."""
    found = [(logprob, token.strip()) for token, logprob in tokens if _is_letter(token)]
    return max(found, key=lambda pair: (pair[0], -ord(pair[1])))[1] if found else None


def _is_letter(token: str) -> bool:
    return token.removeprefix(" ") in list(LETTERS)


def grade(reply: Reply, gold: str) -> Grade:
    """By the tokens where they were asked for, else by the text.

    The outcome of a text is by its strict letter; `strict` and `flexible` say which were right.
    """
    if reply.tokens:
        letter = likeliest(reply.tokens)
        return Grade(_outcome(letter, gold, task.NO_ANSWER), letter)
    letter, named = strict(reply.visible), flexible(reply)
    more = {"strict": letter == gold, "flexible": named == gold, "flexible_answer": named}
    return Grade(_outcome(letter, gold, reply.without_answer()), letter, more)


def _outcome(letter: str | None, gold: str, without: str) -> str:
    if letter is None:
        return without
    return CORRECT if letter == gold else WRONG
