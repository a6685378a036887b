"""What every program that asks models is told on its command line, contestants aside."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from eval.client import Client

DEFAULT_URL = "http://127.0.0.1:8402"


@dataclasses.dataclass(frozen=True)
class Asking:
    """Whom to ask how, and where the results go."""

    base_url: str
    out: Path
    seed: int
    thinking: str  # "on", "off", or "" for what the model does by itself
    tries: int
    timeout_s: float
    api_key: str
    is_new_run: bool
    is_repair: bool
    is_json: bool

    def client(self) -> Client:
        """Raises ValueError for an address that cannot be one."""
        return Client(self.base_url, self.timeout_s, api_key=self.api_key)


def add_where(parser: argparse.ArgumentParser, out: Path) -> argparse._ArgumentGroup:
    where = parser.add_argument_group("where")
    where.add_argument(
        "--base-url",
        default=DEFAULT_URL,
        help="the daemon, or any server that speaks OpenAI's protocol (%(default)s)",
    )
    where.add_argument("--api-key-env", metavar="NAME", help="the variable that holds its API key")
    where.add_argument("--out", type=Path, default=out, help="folder for the results (%(default)s)")
    return where


def add_thinking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--thinking",
        choices=("on", "off"),
        default="",
        help="tell the model's template so; without it the model does as it does",
    )


def add_how(group: argparse._ArgumentGroup, shown: str) -> None:
    """`shown` is what --json prints beside the progress."""
    group.add_argument(
        "--tries",
        type=from_1,
        default=3,
        help="of a question that the server fails to answer (%(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for one answer (%(default)s)",
    )
    group.add_argument(
        "--new-run",
        action="store_true",
        help="set results of a run with other settings aside instead of refusing to mix",
    )
    group.add_argument("--repair", action="store_true", help="drop broken lines of a results file")
    group.add_argument("--json", action="store_true", help=f"progress and {shown} as JSON lines")


def asking(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Asking`. Raises ValueError, in words for the user."""
    if args.api_key_env and not os.environ.get(args.api_key_env):
        raise ValueError(f"the variable {args.api_key_env} of --api-key-env is empty")
    if not args.timeout > 0:
        raise ValueError("--timeout takes seconds above 0")
    return {
        "base_url": args.base_url,
        "out": args.out,
        "seed": args.seed,
        "thinking": args.thinking,
        "tries": args.tries,
        "timeout_s": args.timeout,
        "api_key": os.environ[args.api_key_env] if args.api_key_env else "",
        "is_new_run": args.new_run,
        "is_repair": args.repair,
        "is_json": args.json,
    }


def from_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
