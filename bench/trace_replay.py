#!/usr/bin/env python3
"""What a step's time saves: a trace of two agents, replayed with and without it.

    python -m bench.trace_replay [--scale N] [--rounds N] [--trace FILE] [--json FILE]

The trace is tests/traces/two_agents.jsonl. The pool is the real one with one place over
simulated children (tests/simulated_pool.py) that take 6 s to load; nothing is computed,
so only the pool's decisions differ. All times run faster by `--scale`, those of the pool
included, and are printed as seconds of the trace. All replays of all rounds run at once,
since they do nothing but wait.

"step 0 s" is the plain rule: whose last request ended first is evicted, as soon as
anybody needs room. "step 5 s" is the default: who ended an answer in tool calls is
spared for that long. Numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.simulated_pool import Life, SimulatedPool, simulated_config, simulated_spec

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "tests" / "traces" / "two_agents.jsonl"
LOAD_S = 6.0
STOP_S = 0.3
FAIR_WAIT_S = 20.0
STEPS_S = (0.0, 5.0)
PATIENCE_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of a trace; README of the format: tests/traces/two_agents.py."""

    gap_s: float
    agent: str
    model: str
    answer_s: float
    tool_calls: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one replay came to, in seconds of the trace."""

    loads: int
    waits_s: Sequence[float]
    total_s: float

    @property
    def mean_wait_s(self) -> float:
        return statistics.fmean(self.waits_s)

    @property
    def p95_wait_s(self) -> float:
        return statistics.quantiles(self.waits_s, n=20)[-1]


def read_trace(file: Path = TRACE) -> list[Request]:
    return [Request(**json.loads(line)) for line in file.read_text().splitlines()]


def replay(trace: Iterable[Request], step_s: float, scale: float) -> Outcome:
    """Play a trace `scale` times as fast as it is written, with one place."""
    config = simulated_config(
        max_sidecars=1, fair_wait_s=FAIR_WAIT_S / scale, step_s=step_s / scale
    )
    life = Life(load_s=LOAD_S / scale, stop_s=STOP_S / scale)
    pool = SimulatedPool(config, lambda spec, number: life)
    agents: dict[str, list[Request]] = {}
    for request in trace:
        agents.setdefault(request.agent, []).append(request)
    waits_s: list[float] = []
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(len(agents)) as executor:
            for agent in [executor.submit(_act, pool, own, scale) for own in agents.values()]:
                waits_s += agent.result()
        total_s = time.monotonic() - began
    finally:
        pool.close(0)
    if faults := pool.faults + pool.faults_at_the_end():
        raise RuntimeError(f"the pool broke its promises: {faults[:3]}")
    return Outcome(len(pool.starts), [wait_s * scale for wait_s in waits_s], total_s * scale)


def _act(pool: SimulatedPool, requests: list[Request], scale: float) -> list[float]:
    """One agent's requests, each after the answer to the last. How long each waited."""
    waits_s = []
    for request in requests:
        time.sleep(request.gap_s / scale)
        with pool.lease(simulated_spec(request.model), PATIENCE_S) as lease:
            waits_s.append(lease.wait_s)
            time.sleep(request.answer_s / scale)
            lease.ended_in_tool_calls = request.tool_calls
    return waits_s


def bench(trace: list[Request], rounds: int, scale: float) -> list[dict[str, float]]:
    with ThreadPoolExecutor(rounds * len(STEPS_S)) as executor:
        runs = {
            step_s: [executor.submit(replay, trace, step_s, scale) for _ in range(rounds)]
            for step_s in STEPS_S
        }
        outcomes = {step_s: [run.result() for run in found] for step_s, found in runs.items()}
    return [
        {
            "step_s": step_s,
            "loads": statistics.median(o.loads for o in found),
            "mean_wait_s": statistics.median(o.mean_wait_s for o in found),
            "p95_wait_s": statistics.median(o.p95_wait_s for o in found),
            "longest_wait_s": statistics.median(max(o.waits_s) for o in found),
            "total_s": statistics.median(o.total_s for o in found),
        }
        for step_s, found in outcomes.items()
    ]


def table(rows: list[dict[str, float]]) -> str:
    layout = "{:<9} {:>6} {:>12} {:>11} {:>15} {:>9}"
    lines = [layout.format("", "loads", "mean wait s", "p95 wait s", "longest wait s", "total s")]
    for row in rows:
        numbers = [f"{row[name]:.1f}" for name in row if name not in ("step_s", "loads")]
        lines.append(layout.format(f"step {row['step_s']:g} s", f"{row['loads']:g}", *numbers))
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=50.0, metavar="N", help="default: 50")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--trace", type=Path, default=TRACE, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(argv)
    if options.scale <= 0 or options.rounds < 1:
        parser.error("--scale takes a number above 0, --rounds a whole number from 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    logging.getLogger("pool").setLevel(logging.ERROR)
    trace = read_trace(options.trace)
    rows = bench(trace, options.rounds, options.scale)
    if options.json:
        about = {"trace": options.trace.name, "requests": len(trace), "scale": options.scale}
        text = json.dumps({**about, "rounds": options.rounds, "results": rows}, indent=2)
        options.json.write_text(text + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
