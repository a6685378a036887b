"""Who is compared: a model and the flags that its llama-server gets for this.

Two sets of flags of one model are two contestants.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re

SLUG_CHARS = 48
HASH_CHARS = 6


@dataclasses.dataclass(frozen=True)
class Contestant:
    model: str
    agent_flags: str = ""

    def __str__(self) -> str:
        return f"{self.model} {self.agent_flags}".rstrip()

    @property
    def slug(self) -> str:
        """For names of files; also apart from each other where case does not count."""
        words = re.sub(r"[^A-Za-z0-9._]+", "-", str(self)).strip("-.")[:SLUG_CHARS].rstrip("-.")
        whole = json.dumps([self.model, self.agent_flags]).encode()
        return f"{words or 'model'}-{hashlib.sha256(whole).hexdigest()[:HASH_CHARS]}"

    def decides(self) -> dict[str, str]:
        return {"model": self.model, "agent_flags": self.agent_flags}


def from_header(value: dict[str, str]) -> Contestant:
    """What `decides` made."""
    return Contestant(value["model"], value.get("agent_flags", ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --models, --contestant and --agent-flags; `chosen` reads them."""
    group = parser.add_argument_group("who answers")
    group.add_argument("--model", metavar="ID", help="one model id")
    group.add_argument("--models", metavar="A,B,C", help="several, one after another")
    group.add_argument(
        "--agent-flags",
        metavar="FLAGS",
        default="",
        help="llama-server flags for --model and --models, sent as X-Agent-Flags: "
        "--agent-flags='-c 8192'",
    )
    group.add_argument(
        "--contestant",
        metavar="'ID FLAGS'",
        action="append",
        default=[],
        help="a model id and flags of its own: 'qwen --cache-type-k q8_0'; may be given again, "
        "also for the same model",
    )


def chosen(args: argparse.Namespace) -> list[Contestant]:
    """In the order in which they are named. Raises ValueError, in words for the user."""
    models = [args.model] if args.model else []
    models += [model.strip() for model in (args.models or "").split(",") if model.strip()]
    found = [Contestant(model, args.agent_flags.strip()) for model in models]
    for text in args.contestant:
        model, _, flags = text.strip().partition(" ")
        if not model:
            raise ValueError("--contestant is empty: it takes 'ID FLAGS'")
        found.append(Contestant(model, flags.strip()))
    if not found:
        raise ValueError("nobody to ask: name --model ID, --models A,B or --contestant 'ID FLAGS'")
    for contestant in found:
        if not (str(contestant).isascii() and str(contestant).isprintable()):
            raise ValueError(f"{contestant!s:.80} cannot be sent in a header: it must be ASCII")
    repeated = {str(one) for one in found if found.count(one) > 1}
    if repeated:
        raise ValueError(f"named twice: {', '.join(sorted(repeated))}")
    return found
