#!/usr/bin/env python3
"""Write two_agents.jsonl: what two coding agents on two models ask for, 100 requests each.

    python3 tests/traces/two_agents.py

An agent works in runs of 3 to 12 steps. Between two steps of a run it waits for a tool
(0.3 to 4 s), between two runs for its human (20 to 90 s). An answer takes 1 to 8 s, and
all but the last of a run end in tool calls. The numbers are drawn from a fixed seed, so
the file is the same each time; they are invented, in sizes as agents show them.

A line is one request: `gap_s` seconds after the agent has its last answer it asks
`model`, which answers for `answer_s` seconds once it is loaded. Lines are sorted by the
moment at which they would be asked if nobody ever waited.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FILE = Path(__file__).with_suffix(".jsonl")
AGENTS = {"planner": "qwen", "coder": "gemma"}
REQUESTS_EACH = 100


def requests_of(agent: str, chance: random.Random) -> list[tuple[float, dict[str, object]]]:
    """One agent's requests with the moment at which each is asked."""
    found: list[tuple[float, dict[str, object]]] = []
    now_s, left_in_run = 0.0, 0
    while len(found) < REQUESTS_EACH:
        is_first = left_in_run == 0
        if is_first:
            left_in_run = chance.randint(3, 12)
        left_in_run -= 1
        gap_s = round(chance.uniform(20, 90) if is_first else chance.uniform(0.3, 4), 2)
        answer_s = round(chance.uniform(1, 8), 2)
        line = {
            "gap_s": gap_s,
            "agent": agent,
            "model": AGENTS[agent],
            "answer_s": answer_s,
            "tool_calls": left_in_run > 0,
        }
        now_s += gap_s
        found.append((now_s, line))
        now_s += answer_s
    return found


def main() -> None:
    chance = random.Random(8402)
    asked = [request for agent in AGENTS for request in requests_of(agent, chance)]
    asked.sort(key=lambda request: request[0])
    FILE.write_text("".join(json.dumps(line) + "\n" for _, line in asked))


if __name__ == "__main__":
    main()
