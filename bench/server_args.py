"""What a production command line of llama-server becomes for a sweep.

Spellings, aliases and how many values a flag takes come from the daemon's own table
(flags.json); a flag that it does not know keeps the words behind it that look like values.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from validator import Flag, FlagTable, Policy

MASK: Final = "***"
SECRETS: Final = frozenset({"--api-key", "--hf-token"})
SECRET_NAME: Final = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
MTP: Final = "draft-mtp"
SPEC_TYPE: Final = "--spec-type"
CTX_SIZE: Final = "--ctx-size"
NAMES_MODEL: Final = frozenset({"--model", "--hf-repo", "--model-url", "--docker-repo"})
MAKES_NO_TEXT: Final = frozenset({"--embedding", "--embeddings", "--reranking", "--rerank"})
N_MAX: Final = "--spec-draft-n-max"
DRAFT_MODEL: Final = "--spec-draft-model"

_FOR_SPECULATION = ("--spec-", "--draft", "--lookup-cache-")
_NUMBER = re.compile(r"-(?:[0-9]|\.[0-9])")


@dataclasses.dataclass(frozen=True)
class Part:
    """A flag with its values, or a word that belongs to none; `words` are as written."""

    name: str  # canonical where it is known, unnegated; empty for a word without a flag
    values: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def is_speculative(self) -> bool:
        return self.name.startswith(_FOR_SPECULATION)


@functools.cache
def _table() -> FlagTable:
    return FlagTable.built_in()


def parts_of(words: Sequence[str]) -> list[Part]:
    """Cut a command line, without its program, into flags with their values."""
    parts = []
    at = 0
    while at < len(words):
        part = _part(words, at)
        parts.append(part)
        at += len(part.words)
    return parts


def _part(words: Sequence[str], at: int) -> Part:
    word = words[at]
    spelling, inline = _table().look_up(word)
    if spelling is not None:
        count = _values_after(spelling.flag, inline, words, at)
        name = spelling.flag.name
    elif word.startswith("-") and not _NUMBER.match(word):
        name, equals, text = word.partition("=")
        inline = text if equals else None
        count = 0 if equals else _values_of_unknown(words, at)
    else:
        return Part("", (), (word,))
    taken = tuple(words[at : at + 1 + count])
    return Part(name, (*(() if inline is None else (inline,)), *taken[1:]), taken)


def _values_after(flag: Flag, inline: str | None, words: Sequence[str], at: int) -> int:
    following = words[at + 1] if at + 1 < len(words) else ""
    is_bare = flag.bare is not None and following not in {*flag.choices, *flag.synonyms}
    wanted = 0 if is_bare else len(flag.takes)
    return max(0, min(wanted - (inline is not None), len(words) - at - 1))


def _values_of_unknown(words: Sequence[str], at: int) -> int:
    count = 0
    for word in words[at + 1 :]:
        if word.startswith("-") and not _NUMBER.match(word):
            break
        count += 1
    return count


def joined(parts: Iterable[Part]) -> list[str]:
    return [word for part in parts for word in part.words]


def without(parts: Iterable[Part], unwanted: Callable[[Part], bool]) -> list[Part]:
    return [part for part in parts if not unwanted(part)]


def is_owned(part: Part) -> bool:
    """Whether the runner sets it: where to listen, keys, the model, the log, the slots page."""
    flag = _table().flag(part.name) if part.name else None
    return part.name in SECRETS or (flag is not None and flag.policy is Policy.DAEMON)


def last_value(parts: Iterable[Part], name: str) -> str | None:
    """The value that counts of a flag that may stand several times."""
    found = [part.values[-1] for part in parts if part.name == name and part.values]
    return found[-1] if found else None


def speculation_types(parts: Iterable[Part]) -> set[str]:
    """All that --spec-type names: repeats of it add up in llama-server."""
    lists = [part.values[-1] for part in parts if part.name == SPEC_TYPE and part.values]
    return {name for each in lists for name in each.split(",")} - {"none"}


def masked(words: Sequence[str]) -> list[str]:
    """The same words without what is secret among them, to be shown or stored."""
    shown: list[str] = []
    for part in parts_of(words):
        if part.name not in SECRETS:
            shown += part.words
        elif len(part.words) == 1:
            shown.append(part.words[0].partition("=")[0] + (f"={MASK}" if part.values else ""))
        else:
            shown += [part.words[0], *[MASK] * (len(part.words) - 1)]
    return shown
