"""The prompts of the A/B comparison: one for each role of an agent, in eval/prompts/*.json.

A file holds `id`, `order`, `role`, `title`, `max_tokens`, `system` and `user` (a text or a
list of lines), `tools` if the model gets any, and `checks` (eval/checks.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.checks import BadCheck, as_text, refuse_bad

PROMPTS = Path(__file__).resolve().parent / "prompts"
FIELDS = {"id", "order", "role", "title", "max_tokens", "system", "user", "checks"}
MAY = {"tools"}


class BadPrompt(ValueError):
    """In words for the user: which file, and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    id: str
    role: str
    title: str
    max_tokens: int
    system: str
    user: str
    tools: tuple[dict[str, Any], ...]
    checks: tuple[dict[str, Any], ...]
    order: int = 0

    @property
    def asked(self) -> dict[str, Any]:
        """What the model sees: the part of a request's body that is this prompt."""
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ]
        asked: dict[str, Any] = {"messages": messages}
        return asked | {"tools": list(self.tools)} if self.tools else asked

    @property
    def sha256(self) -> str:
        """Of what decides the answer, checks left out: these may be bettered afterwards."""
        decides = self.asked | {"max_tokens": self.max_tokens}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode("ascii")).hexdigest()


def load(folder: Path = PROMPTS) -> list[Prompt]:
    """All prompts in their order. Raises BadPrompt or OSError."""
    prompts = [_read(file) for file in sorted(folder.glob("*.json"))]
    if not prompts:
        raise BadPrompt(f"there are no prompts (*.json) in {folder}")
    return sorted(prompts, key=lambda prompt: (prompt.order, prompt.id))


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over what all of them ask."""
    text = json.dumps({prompt.id: prompt.sha256 for prompt in prompts}, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _read(file: Path) -> Prompt:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return _prompt(value, file.stem)
    except (ValueError, TypeError) as exc:
        raise BadPrompt(f"{file}: {exc}") from exc


def _prompt(value: Any, stem: str) -> Prompt:
    if not isinstance(value, dict):
        raise TypeError("it is no JSON object")
    if missing := FIELDS - value.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    if strange := value.keys() - FIELDS - MAY:
        raise ValueError(f"nothing is known of {', '.join(sorted(strange))}")
    if value["id"] != stem:
        raise ValueError(f"its id {value['id']!r} is not the file's name")
    if not isinstance(value["max_tokens"], int) or value["max_tokens"] < 1:
        raise ValueError(f"max_tokens: {value['max_tokens']!r} is no whole number above 0")
    for check in value["checks"]:
        refuse_bad(check)
        _refuse_bad_pattern(check)
    return Prompt(
        id=value["id"],
        role=value["role"],
        title=value["title"],
        max_tokens=value["max_tokens"],
        system=as_text(value["system"]),
        user=as_text(value["user"]),
        tools=tuple(value.get("tools", ())),
        checks=tuple(value["checks"]),
        order=value["order"],
    )


def _refuse_bad_pattern(check: dict[str, Any]) -> None:
    try:
        re.compile(check.get("pattern", ""))
    except re.error as exc:
        raise BadCheck(f"{check['label']}: {check['pattern']}: {exc}") from exc
