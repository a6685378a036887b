"""python -m eval.votes: a sheet for a person to vote on replies without knowing whose they are.

`python -m eval.ab --blind-sheet` writes it, and the key beside it; a person writes A, B or
T behind each "Vote"; this reads the votes. Nobody should look into the key before.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.journal import write_whole
from eval import stats
from eval.judge import Pair
from eval.roles import Prompt
from eval.stats import Game

SHEET = "ab-sheet.md"
VOTES = "ab-votes.json"
SCORES = {"A": 1.0, "B": 0.0, "T": 0.5}
VOTE = re.compile(r"^Vote (\d+):[ \t]*(.*?)[ \t]*$", re.IGNORECASE)
SHEET_ID = re.compile(r"^Sheet ([0-9a-f]{12})$", re.MULTILINE)
FENCE = re.compile(r"^(`{3,})(?:text)?[ \t]*$")

HEAD = """\
# Which reply is better?

Sheet {id}

Behind each "Vote" write A, B, or T for a tie; leave open what you cannot judge. Then:
`python -m eval.votes {name}`. Who is A and who is B was drawn by lot, anew for each
question; the file {key} knows it and is best left closed.
"""


class BadSheet(ValueError):
    """In words for the user: which line, and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    text: str
    key: dict[str, Any]


def key_of(sheet: Path) -> Path:
    return sheet.with_name(f"{sheet.stem}.key.json")


def votes_of(sheet: Path) -> Path:
    return sheet.with_name(VOTES)


# --- writing


def write(path: Path, pairs: Sequence[Pair], seed: int, limit: int | None) -> int:
    """Write sheet and key; how many questions it has. Equal texts are left out.

    Raises BadSheet if there is a sheet already, which may hold votes, or OSError.
    """
    if path.exists():
        raise BadSheet(f"{path} is there already and may hold votes: move it away for a new one")
    drawn = sheet_of(pairs, seed, limit, path.name)
    write_whole(key_of(path), (json.dumps(drawn.key, indent=2) + "\n").encode())
    write_whole(path, drawn.text.encode("utf-8", "replace"))
    return len(drawn.key["questions"])


def sheet_of(pairs: Sequence[Pair], seed: int, limit: int | None, name: str = SHEET) -> Sheet:
    """Pairs in a random order, with random seats; the same for the same seed."""
    lot = random.Random(f"blind sheet/{seed}")
    shown = [pair for pair in pairs if not pair.is_same_text]
    lot.shuffle(shown)
    questions, sections = {}, []
    for number, pair in enumerate(shown[:limit], 1):
        order = lot.choice(("ab", "ba"))
        at_a, at_b = pair.seated(order)
        questions[str(number)] = {
            "prompt": pair.prompt.id,
            "A": at_a.slug,
            "B": at_b.slug,
            "pair_sha256": pair.sha256,
        }
        sections.append(_section(number, pair.prompt, at_a.text, at_b.text))
    body = "\n".join(sections)
    sheet_id = hashlib.sha256(f"{json.dumps(questions)}\n{body}".encode(errors="replace"))
    key = {"sheet": sheet_id.hexdigest()[:12], "seed": seed, "questions": questions}
    head = HEAD.format(id=key["sheet"], name=name, key=key_of(Path(name)).name)
    return Sheet(f"{head}\n{body}", key)


def _section(number: int, prompt: Prompt, text_a: str, text_b: str) -> str:
    parts = [
        f"## {number}. {prompt.role}: {prompt.title}",
        f"The task:\n\n{_fenced(prompt.system)}\n\n{_fenced(prompt.user)}",
        f"### A\n\n{_fenced(text_a)}",
        f"### B\n\n{_fenced(text_b)}",
        f"Vote {number}: ",
    ]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    """In a fence longer than any in the text, so that nothing in it can end it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip() or '(empty)'}\n{fence}"


# --- reading


def read(text: str, key: Mapping[str, Any]) -> dict[str, str]:
    """Number of the question -> A, B or T; open ones are left out. Raises BadSheet."""
    text = text.replace("\r\n", "\n")  # an editor of Windows
    found = SHEET_ID.search(text)
    if not found or found[1] != key.get("sheet"):
        raise BadSheet("this sheet does not belong to this key")
    votes: dict[str, str] = {}
    seen: set[str] = set()
    for line_number, number, vote in _vote_lines(text):
        if number not in key["questions"]:
            raise BadSheet(f"line {line_number}: there is no question {number}")
        if number in seen:
            raise BadSheet(f"line {line_number}: a second vote on question {number}")
        seen.add(number)
        if vote and vote.upper() not in SCORES:
            raise BadSheet(f"line {line_number}: {vote!r} is none of A, B and T")
        if vote:
            votes[number] = vote.upper()
    return votes


def _vote_lines(text: str) -> list[tuple[int, str, str]]:
    """Line number, question and vote, of lines that stand outside of what models wrote."""
    found, fence = [], ""
    for line_number, line in enumerate(text.split("\n"), 1):
        if fence:
            fence = "" if line.rstrip() == fence else fence
        elif opened := FENCE.match(line):
            fence = opened[1]
        elif vote := VOTE.match(line):
            found.append((line_number, str(int(vote[1])), vote[2]))
    return found


@dataclasses.dataclass(frozen=True)
class Voted:
    game: Game
    pair_sha256: str  # of the texts that were seen


def voted(votes: Mapping[str, str], key: Mapping[str, Any]) -> list[Voted]:
    return [
        Voted(Game(it["prompt"], it["A"], it["B"], SCORES[votes[number]]), it["pair_sha256"])
        for number, it in key["questions"].items()
        if number in votes
    ]


def as_json(found: Sequence[Voted]) -> bytes:
    rows = [dataclasses.asdict(one) for one in found]
    return (json.dumps({"votes": rows}, indent=2) + "\n").encode()


def stored(path: Path) -> list[Voted]:
    """What `main` wrote; nothing where there is no file. Raises OSError or BadSheet."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_bytes())["votes"]
        return [Voted(Game(**row["game"]), row["pair_sha256"]) for row in rows]
    except (ValueError, TypeError, KeyError) as exc:
        raise BadSheet(f"{path} is no file of votes: {exc}") from exc


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.votes",
        description="Read the votes on a blind sheet, and keep them for the report of eval.ab.",
    )
    parser.add_argument("sheet", type=Path, help=f"the sheet with votes ({SHEET})")
    parser.add_argument("--key", type=Path, help="its key (beside it unless given)")
    args = parser.parse_args(argv)
    try:
        key = json.loads((args.key or key_of(args.sheet)).read_bytes())
        votes = read(args.sheet.read_text(encoding="utf-8"), key)
        found = voted(votes, key)
        write_whole(votes_of(args.sheet), as_json(found))
    except (BadSheet, OSError, ValueError) as exc:
        print(f"eval.votes: {exc}", file=sys.stderr)
        return 1
    print(f"{len(votes)} of {len(key['questions'])} questions have a vote")
    games = [one.game for one in found]
    names = sorted({name for game in games for name in (game.first, game.second)})
    for rating in stats.ratings(names, games):
        low, high = rating.interval.low, rating.interval.high
        print(
            f"{rating.elo:6.0f} [{low:.0f}, {high:.0f}]  {rating.contestant}  "
            f"won {rating.wins}, tied {rating.ties}, lost {rating.losses}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
