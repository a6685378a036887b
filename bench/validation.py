#!/usr/bin/env python3
"""What judging flags costs: the time that the validator adds to a request.

    python bench/validation.py [--quick] [--rounds N] [--json FILE]

No server and no socket: the calls that the daemon makes between the head of a
request and its llama-server, one after the other in one thread. A header that was
not seen before is read in full; the same one again is looked up, which is measured
too. Defaults are what request-level flags put into the body; that time holds the
reading of the body, as the daemon does it.

The number is the median over the rounds of a round's mean, in microseconds of
processor time, so that other work on the machine counts for little. The spread
beside it is the fastest and the slowest round.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from validator import FlagsRefused, JsonObject, Layer, Validator  # noqa: E402

BASE_ARGS = ["-ngl", "999", "-c", "32768", "--flash-attn", "on", "--no-mmap"]
MODEL = Path("/models/m.gguf")

TWENTY_FLAGS = (
    "-c 8192 --cache-type-k q8_0 --cache-type-v q8_0 -t 8 -tb 8 -b 2048 -ub 512 --temp 0.7 "
    "--top-k 40 --top-p=0.9 --min-p 0.05 --repeat-penalty 1.1 --seed 42 -n 512 --jinja "
    "--rope-scaling yarn --rope-freq-base 1000000 --no-context-shift --cache-reuse 256 "
    "--reasoning-format deepseek"
)
REQUEST_FLAGS = (
    "--temp 0.7 --top-k 40 --top-p 0.9 --min-p 0.05 --repeat-penalty 1.1 --seed 42 -n 512 "
    "--presence-penalty 0.2 --chat-template-kwargs '{\"enable_thinking\": false}'"
)
HOSTILE_BYTES = 24_000  # just below the longest header that is read at all


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, and how often a round makes it."""

    name: str
    call: Callable[[], object]
    calls: int


def refused(validator: Validator, header: str) -> None:
    try:
        validator.resolve("m", MODEL, Layer(), header)
    except FlagsRefused:
        return
    raise AssertionError(f"was taken: {header[:80]}")


def chat_body(chars: int) -> str:
    """A conversation in about so many characters."""
    turn = {"role": "user", "content": 'He said: "as it was."\n' * 8}
    turns = max(1, chars // (len(json.dumps(turn)) + 2))
    return json.dumps({"model": "m", "messages": [turn] * turns, "stream": True})


def hostile_headers() -> dict[str, str]:
    """What takes longest of each kind of nonsense."""
    members = ",".join(f'"{number}":1' for number in range(2_600))
    return {
        "unknown flags": " ".join(f"--{'cache-type-' * 8}{number}" for number in range(255)),
        "one word": "--" + "ctx-size" * (HOSTILE_BYTES // 8 - 1),
        "single quotes": "'" * HOSTILE_BYTES,
        "escaped quotes": '\\"' * (HOSTILE_BYTES // 2),
        "members": f"--chat-template-kwargs '{{{members}}}' --top-k x",
    }


def cases() -> list[Case]:
    validator = Validator(BASE_ARGS)
    layer = Layer()
    unseen = (f"m{number}" for number in itertools.count())  # never looked up
    validator.resolve("m", MODEL, layer, TWENTY_FLAGS)
    defaults = validator.resolve("m", MODEL, layer, REQUEST_FLAGS).defaults

    def judging(header: str) -> Callable[[], object]:
        return lambda: validator.resolve(next(unseen), MODEL, layer, header)

    def applying(body: str) -> Callable[[], object]:
        return lambda: defaults.applied_to(JsonObject(body))

    def refusing(header: str) -> Callable[[], object]:
        return lambda: refused(validator, header)

    return [
        Case("20 flags, not seen before", judging(TWENTY_FLAGS), 500),
        Case("20 flags, again", lambda: validator.resolve("m", MODEL, layer, TWENTY_FLAGS), 5_000),
        Case("9 request-level flags, not seen before", judging(REQUEST_FLAGS), 500),
        Case("defaults into a chat body of 2 kB", applying(chat_body(2_000)), 500),
        Case("defaults into a chat body of 200 kB", applying(chat_body(200_000)), 20),
        *(
            Case(f"refused: {len(header) / 1000:.0f} kB of {name}", refusing(header), 5)
            for name, header in hostile_headers().items()
        ),
    ]


def mean_us(case: Case, share: float) -> float:
    calls = max(1, int(case.calls * share))
    began = time.process_time()
    for _ in range(calls):
        case.call()
    return (time.process_time() - began) / calls * 1e6


def run(rounds: int, share: float) -> list[dict[str, object]]:
    found: dict[str, list[float]] = {}
    all_cases = cases()
    for case in all_cases:
        case.call()  # what is worked out once and kept is not measured
    for _ in range(rounds):
        for case in all_cases:
            found.setdefault(case.name, []).append(mean_us(case, share))
    return [
        {"case": name, "median_us": statistics.median(means), "rounds_us": means}
        for name, means in found.items()
    ]


def table(rows: Sequence[dict[str, object]]) -> str:
    layout = "{:<42} {:>10} {:>10} {:>10}"
    lines = [layout.format("microseconds of processor time", "median", "fastest", "slowest")]
    for row in rows:
        means = row["rounds_us"]
        assert isinstance(means, list)
        numbers = (statistics.median(means), min(means), max(means))
        lines.append(layout.format(str(row["case"]), *(f"{number:.1f}" for number in numbers)))
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="default: 21")
    parser.add_argument("--quick", action="store_true", help="a second, to see that it works")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds takes whole numbers from 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    rows = run(1, 0.2) if options.quick else run(options.rounds, 1.0)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"python": sys.version, "results": rows}, indent=2))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
