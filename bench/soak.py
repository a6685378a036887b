#!/usr/bin/env python3
"""Hours of agents in minutes: the daemon over the real llama-server while processes are killed.

    python -m bench.soak [--minutes N] [--agents N] [--seed N]

Two models share one place, so that nearly every change of model is a swap.
Agents ask with and without streaming, some leave early, some bring flags of
their own. Every 20 seconds or so a child is killed (SIGKILL), now and then one
is deleted. At the end: how many requests were served, what went wrong, and what
the daemon holds compared with its start, both times without a child.

Exits with 1 if a request failed that no kill can have broken, if the daemon
holds more than at its start, or if a process is left over.

Needs Linux (/proc) and what tests/real_parts.py finds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.client
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import winsvc
from tests import real_parts
from tests.daemon import CHAT, SIGKILL, Daemon, free_port_range, started_daemon, wait_until

MODELS = ("smollm2", "gemma")
FLAGS = ("--cache-type-k q8_0", "-c 4096")
BASE_ARGS = ("-c", "2048", "-t", "2", "--parallel", "2")
PROMPTS = (
    "Name three rivers.",
    "What is a semaphore? Answer in one sentence.",
    "Write a function that adds two numbers.",
    "Continue: one, two, three,",
)
KILL_EVERY_S = (10.0, 30.0)
DELETES = 0.25  # of the kills
REPORT_EVERY_S = 30.0
TELLING_S = 1.0  # from a death to the last client that is told of it
SETTLE_S = 30.0
STOP_S = 20.0
GROWTH_BYTES = 32 << 20  # more is a leak: Python itself gives back memory reluctantly


class Broken(Exception):
    """A stream or answer ended before its end."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request of an agent, as it wants it."""

    model: str
    flags: str | None
    is_streamed: bool
    leaves_early: bool
    body: bytes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request; times from time.monotonic()."""

    begun: float
    ended: float
    code: str  # "ok", "left", "cut", or the code of the error
    message: str = ""

    @property
    def is_fine(self) -> bool:
        return self.code in ("ok", "left")


class Ledger:
    """Everything that happened so far. Safe to share by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two lists
        self._outcomes: list[Outcome] = []
        self._kills: list[float] = []

    def add(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes.append(outcome)

    def add_kill(self) -> None:
        """To be called before the kill."""
        with self._lock:
            self._kills.append(time.monotonic())

    def outcomes(self) -> list[Outcome]:
        with self._lock:
            return list(self._outcomes)

    def kills(self) -> list[float]:
        with self._lock:
            return list(self._kills)

    def unexplained(self) -> list[Outcome]:
        """Failures that no kill can have caused."""
        kills = self.kills()
        return [o for o in self.outcomes() if not o.is_fine and not _is_explained(o, kills)]


def _is_explained(outcome: Outcome, kills: Sequence[float]) -> bool:
    """A kill while it ran; or the reason stored of a load that was killed."""
    if outcome.code == "model_load_failed":
        return f"killed by signal {SIGKILL}" in outcome.message
    was_killed = any(outcome.begun - TELLING_S < kill < outcome.ended for kill in kills)
    return outcome.code in ("upstream_failed", "cut") and was_killed


# --- agents


class Agent:
    """Asks one request after the other; stays with a model for some steps."""

    def __init__(self, daemon: Daemon, ledger: Ledger, seed: int) -> None:
        self._daemon = daemon
        self._ledger = ledger
        self._chosen = random.Random(seed)

    def run(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            model = self._chosen.choice(MODELS)
            flags = self._chosen.choice(FLAGS) if self._chosen.random() < 0.15 else None
            for _ in range(self._chosen.randint(1, 5)):
                if stopped.is_set():
                    return
                self._ledger.add(self._outcome_of(self._next(model, flags)))

    def _next(self, model: str, flags: str | None) -> Asked:
        is_streamed = self._chosen.random() < 0.5
        body = {
            "model": model,
            "messages": [{"role": "user", "content": self._chosen.choice(PROMPTS)}],
            "max_tokens": self._chosen.randint(4, 40),
            "stream": is_streamed,
        }
        leaves_early = self._chosen.random() < 0.15
        return Asked(model, flags, is_streamed, leaves_early, json.dumps(body).encode())

    def _outcome_of(self, asked: Asked) -> Outcome:
        begun = time.monotonic()
        try:
            code, message = self._ask(asked)
        except Broken as exc:
            code, message = "cut", str(exc)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            code, message = "no answer", repr(exc)
        return Outcome(begun, time.monotonic(), code, message)

    def _ask(self, asked: Asked) -> tuple[str, str]:
        """Raises Broken, OSError, HTTPException, ValueError."""
        patience_s = self._chosen.uniform(0.05, 2.0)
        connection = http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=400)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            headers |= {"X-Agent-Flags": asked.flags} if asked.flags else {}
            connection.request("POST", CHAT, asked.body, headers)
            if asked.leaves_early and not winsvc.wait_readable([connection.sock], patience_s):
                return "left", ""
            with connection.getresponse() as response:
                return _read(response, asked)


def _read(response: http.client.HTTPResponse, asked: Asked) -> tuple[str, str]:
    if asked.leaves_early and response.status == 200:
        response.readline()
        return "left", ""
    try:
        data = response.read()
    except http.client.IncompleteRead as exc:
        raise Broken(f"after {len(exc.partial)} bytes") from exc
    if response.status != 200:
        error = json.loads(data)["error"]
        return str(error["code"]), str(error["message"])
    if asked.is_streamed and not data.endswith(b"data: [DONE]\n\n"):
        raise Broken("it ended as if it were whole")
    if not asked.is_streamed and not json.loads(data)["choices"]:
        return "no choices", ""
    return "ok", ""


# --- kills


class Killer:
    """Kills or deletes a random child now and then."""

    def __init__(self, daemon: Daemon, ledger: Ledger, seed: int) -> None:
        self._daemon = daemon
        self._ledger = ledger
        self._chosen = random.Random(seed)
        self.killed = 0
        self.deleted = 0

    def run(self, stopped: threading.Event) -> None:
        while not stopped.wait(self._chosen.uniform(*KILL_EVERY_S)):
            rows = [row for row in self._daemon.sidecars() if row["pid"]]
            if not rows:
                continue
            row = self._chosen.choice(rows)
            if self._chosen.random() < DELETES:
                self._delete(row["hash"])
            else:
                self._kill(row["pid"])

    def _delete(self, hash_: str) -> None:
        self._ledger.add_kill()
        self.deleted += self._daemon.ask("DELETE", f"/sidecars/{hash_}")[0] == 200

    def _kill(self, pid: int) -> None:
        stamp = winsvc.process_stamp(pid)
        is_there = pid in [row["pid"] for row in self._daemon.sidecars()]
        if stamp and is_there:  # so the stamp is that of the child, not of a later process
            self._ledger.add_kill()
            self.killed += winsvc.end_process(pid, stamp)


# --- what a process holds


@dataclasses.dataclass(frozen=True)
class Holdings:
    """What the daemon holds at one moment."""

    rss_bytes: int
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        status = Path(f"/proc/{pid}/status").read_text()
        found = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(found["VmRSS"]) * 1024, int(found["Threads"]), descriptors)

    def leaks_beside(self, start: Holdings) -> bool:
        return (
            self.rss_bytes > start.rss_bytes + GROWTH_BYTES
            or self.threads > start.threads
            or self.descriptors > start.descriptors
        )


def holdings_without_children(daemon: Daemon, start: Holdings | None = None) -> Holdings:
    """What it holds at rest. With `start`, waits SETTLE_S for it to come down to that."""
    for row in daemon.sidecars():
        daemon.ask("DELETE", f"/sidecars/{row['hash']}")
    wait_until(lambda: not daemon.sidecars(), "every child is deleted")
    deadline = time.monotonic() + SETTLE_S
    while True:
        held = Holdings.of(daemon.process.pid)
        if start is None or not held.leaks_beside(start) or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def left_over(server_bin: Path, ports: str) -> list[int]:
    """Processes of this llama-server on one of our ports."""
    first, last = map(int, ports.split("-"))
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if argv[0] == str(server_bin) and "--port" in argv:
                port = int(argv[argv.index("--port") + 1])
                found += [int(entry.name)] if first <= port <= last else []
    return found


# --- the run


@dataclasses.dataclass(frozen=True)
class Result:
    """All that the final table shows."""

    outcomes: list[Outcome]
    unexplained: list[Outcome]
    killed: int
    deleted: int
    starts: int
    swaps: int
    start: Holdings
    end: Holdings
    exit_code: int
    orphans: int

    def faults(self) -> list[str]:
        faults = [f"{o.code}: {o.message}" for o in self.unexplained]
        if self.end.leaks_beside(self.start):
            faults.append(f"the daemon holds more than before: {self.start} became {self.end}")
        if self.exit_code:
            faults.append(f"the daemon ended with {self.exit_code}")
        if self.orphans:
            faults.append(f"{self.orphans} processes are left over")
        return faults


def soak(options: argparse.Namespace, folder: Path) -> Result:
    server_bin, ports = real_parts.llama_server_bin(), free_port_range()
    map_file = folder / "models.json"
    map_file.write_text(
        json.dumps({"smollm2": str(real_parts.smollm2()), "gemma": str(real_parts.gemma())})
    )
    settings = {
        "LLAMA_SERVER_BIN": str(server_bin),
        "MODEL_DIR_MAP_FILE": str(map_file),
        "LLAMA_SIDECAR_BIND": "127.0.0.1:0",
        "PORT_RANGE": ports,
        "MAX_SIDECARS": "1",
        "BASE_ARGS": json.dumps(BASE_ARGS),
    }
    ledger = Ledger()
    try:
        with started_daemon(settings, folder) as daemon:
            killer = Killer(daemon, ledger, options.seed)
            start, end = _live(daemon, ledger, killer, options)
            exit_code = daemon.stop(timeout_s=STOP_S)
    finally:
        orphans = left_over(server_bin, ports)
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)
    return Result(
        outcomes=ledger.outcomes(),
        unexplained=ledger.unexplained(),
        killed=killer.killed,
        deleted=killer.deleted,
        starts=daemon.log.count(" start hash="),
        swaps=daemon.log.count(" why=room for "),
        start=start,
        end=end,
        exit_code=exit_code,
        orphans=len(orphans),
    )


def _live(
    daemon: Daemon, ledger: Ledger, killer: Killer, options: argparse.Namespace
) -> tuple[Holdings, Holdings]:
    """Let agents and killer run; what the daemon held before and after."""
    for model in MODELS:  # whatever is made once is made now
        daemon.chat(model, max_tokens=4)
    start = holdings_without_children(daemon)
    stopped = threading.Event()
    agents = [Agent(daemon, ledger, options.seed + number) for number in range(options.agents)]
    threads = [winsvc.start_thread("agent", agent.run, stopped) for agent in agents]
    threads.append(winsvc.start_thread("killer", killer.run, stopped))
    begun = time.monotonic()
    try:
        while (left_s := begun + options.minutes * 60 - time.monotonic()) > 0:
            time.sleep(min(left_s, REPORT_EVERY_S))
            print(_progress(time.monotonic() - begun, ledger, daemon), flush=True)
    finally:
        stopped.set()
        for thread in threads:
            thread.join(STOP_S * 3)
    return start, holdings_without_children(daemon, start)


def _progress(now_s: float, ledger: Ledger, daemon: Daemon) -> str:
    outcomes, held = ledger.outcomes(), Holdings.of(daemon.process.pid)
    return (
        f"{now_s:6.0f} s  {len(outcomes)} requests, {sum(o.is_fine for o in outcomes)} fine, "
        f"{len(ledger.kills())} kills, {len(ledger.unexplained())} unexplained failures; "
        f"{held.rss_bytes / 2**20:.1f} MiB, {held.threads} threads, {held.descriptors} files"
    )


def table(result: Result) -> str:
    ok = sorted(o.ended - o.begun for o in result.outcomes if o.code == "ok")
    cuts = statistics.quantiles(ok, n=20, method="inclusive") if len(ok) > 1 else [0.0] * 19
    codes = collections.Counter(o.code for o in result.outcomes)
    unexplained = collections.Counter(o.code for o in result.unexplained)
    start, end = result.start, result.end
    rows = [
        ("requests", str(len(result.outcomes))),
        ("children started", str(result.starts)),
        ("swaps", str(result.swaps)),
        ("killed, deleted", f"{result.killed}, {result.deleted}"),
        *((f"ended as: {code}", str(count)) for code, count in codes.most_common()),
        *((f"unexplained: {code}", str(count)) for code, count in unexplained.most_common()),
        ("latency p50, p95", f"{cuts[9]:.2f} s, {cuts[18]:.2f} s"),
        ("memory", f"{start.rss_bytes / 2**20:.1f} MiB -> {end.rss_bytes / 2**20:.1f} MiB"),
        ("threads", f"{start.threads} -> {end.threads}"),
        ("open files", f"{start.descriptors} -> {end.descriptors}"),
        ("orphans", str(result.orphans)),
    ]
    return "\n".join(f"{name:32} {value}" for name, value in rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description="Soak the daemon while children die.")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N")
    parser.add_argument("--agents", type=int, default=4, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what agents choose")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every `finally`
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(options, Path(folder))
    print(table(result))
    for fault in result.faults():
        print(f"soak: {fault}", file=sys.stderr)
    return 1 if result.faults() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
