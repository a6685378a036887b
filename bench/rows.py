"""The rows of the benchmark: each measures one thing, once a round.

What a row finds is named, and each has two values: `base` (None where there is nothing
to compare with) and `daemon`. Base is the same request direct to the same upstream,
unless the name says "against ...".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import winsvc
from bench import wrk
from bench.parts import (
    CHAT,
    HOST,
    PATIENCE_S,
    POLL_S,
    ROOT,
    TEXT,
    BenchError,
    Daemon,
    Launcher,
    Setup,
    Target,
    answers_health,
    ask,
    await_health,
    free_port,
    running_daemon,
    started,
)
from bench.streams import CHUNK_BYTES
from bench.validation import TWENTY_FLAGS, chat_body
from tests import real_parts

Found = dict[str, tuple[float | None, float]]

MANY = 64
CLOSING = 8  # connections of the row whose connections serve one request each
HEADERS = 50
KNOWN = (1, 10, 50)  # sidecars
BIG_BYTES = 20_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often; all rows of a run share them."""

    rounds: int = 5
    seconds: int = 3  # of each load of wrk; it takes whole ones
    chunks: int = 150  # of each of 100 streams
    flood_chunks: int = 150_000  # of the stream without delay
    crowd_chunks: int = 30  # of each of 500 streams
    requests: int = 100_000  # for the memory; it is looked at after half of them too


QUICK = Settings(
    rounds=1, seconds=1, chunks=50, flood_chunks=30_000, crowd_chunks=10, requests=10_000
)


class Bench:
    """What the rows share: one daemon over instant and streaming upstreams, kept for the run."""

    def __init__(
        self, program: Path, settings: Settings, folder: Path, stack: contextlib.ExitStack
    ) -> None:
        self.program = program
        self.settings = settings
        self.folder = folder
        self.round = 0
        self.launcher = Launcher(folder)
        self._stack = stack
        self._kept: dict[str, Daemon] = {}

    def setup(self, *models: str, max_sidecars: int = 8) -> Setup:
        """A daemon over the launcher; models that are called so have a kind of their own."""
        files = {}
        for model in models:
            kind = model if model in ("stream", "sink", "parsing") else "instant"
            files[model] = self.folder / f"{model}.{kind}"
            files[model].touch()
        return Setup(self.program, self.launcher.path, files, max_sidecars)

    def kept_daemon(self, name: str, *models: str, max_sidecars: int = 8) -> Daemon:
        """Up until the run ends, with a sidecar for each model."""
        if name not in self._kept:
            running = self.fresh_daemon(*models, max_sidecars=max_sidecars)
            self._kept[name] = self._stack.enter_context(running)
        return self._kept[name]

    @contextlib.contextmanager
    def fresh_daemon(self, *models: str, max_sidecars: int = 8) -> Iterator[Daemon]:
        folder = self.folder / f"daemon-{time.monotonic_ns()}"
        with running_daemon(self.setup(*models, max_sidecars=max_sidecars), folder) as daemon:
            for model in models:
                load(daemon, model)
            yield daemon

    def shared(self) -> Daemon:
        return self.kept_daemon("shared", "instant", "stream", "sink", "parsing")

    def wrk(self, load: wrk.Load, target: Target) -> wrk.Result:
        return wrk.run(load, target, self.folder)

    def both(self, model: str, measure: Callable[[Target], Found]) -> Found:
        """Direct and through the shared daemon; who goes first changes from round to round."""
        daemon = self.shared()
        ways = {"base": daemon.upstream(model, self.launcher), "daemon": daemon.target(model)}
        found: dict[str, Found] = {}
        cpu_s = 0.0
        for way in list(ways)[:: -1 if self.round % 2 else 1]:
            before_s = daemon.cpu_s()
            found[way] = measure(ways[way])
            if way == "daemon":
                cpu_s = daemon.cpu_s() - before_s
        pairs: Found = {
            name: (found["base"][name][1], value) for name, (_, value) in found["daemon"].items()
        }
        if count := pairs.pop("count", (0.0, 0.0))[1]:
            pairs["processor time of the daemon, us each"] = (None, cpu_s / count * 1e6)
        return pairs


def chat(model: str = "instant", **more: object) -> bytes:
    """A small chat request."""
    messages = [{"role": "user", "content": "Count, please."}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 32, **more}).encode()


def load(daemon: Daemon, model: str) -> None:
    """Have the daemon start the model's sidecar. Raises BenchError if it does not answer."""
    body = chat(model, bench={"chunks": 1, "delay_s": 0}, stream=model == "stream")
    status, answer = ask(daemon.target(model), "POST", CHAT, body)
    if status != 200:
        raise BenchError(f"the daemon answers {status} for {model}: {answer}")


# --- whole answers


def whole_answers(bench: Bench, load: wrk.Load) -> Found:
    def measure(target: Target) -> Found:
        result = bench.wrk(load, target)
        return {
            "p50 us": (None, result.p50_us),
            "p99 us": (None, result.p99_us),
            "requests/s": (None, result.rate),
            "count": (None, result.requests),
        }

    return bench.both("instant", measure)


def one(bench: Bench) -> Found:
    return whole_answers(bench, wrk.Load(1, bench.settings.seconds, chat()))


def many(bench: Bench) -> Found:
    return whole_answers(bench, wrk.Load(MANY, bench.settings.seconds, chat()))


def close(bench: Bench) -> Found:
    headers = ("Connection: close",)
    return whole_answers(bench, wrk.Load(CLOSING, bench.settings.seconds, chat(), headers=headers))


def joined(bench: Bench) -> Found:
    """The daemon puts the answer together from the stream; direct, wrk gets the stream."""
    body = json.dumps({"model": "instant", "prompt": "Count, please."}).encode()
    return whole_answers(bench, wrk.Load(1, bench.settings.seconds, body, path=TEXT))


# --- streams


def streams(
    target: Target, chunks: int, delay_s: float, count: int, spread_s: float
) -> dict[str, Any]:
    """One load of streams, in a process of its own."""
    wish = {"chunks": chunks, "delay_s": delay_s}
    job = {
        "port": target.port,
        "key": target.key,
        "path": CHAT,
        "body": chat(target.model, stream=True, bench=wish).decode(),
        "streams": count,
        "spread_s": spread_s,
        "delay_s": delay_s,
        "timeout_s": chunks * delay_s + PATIENCE_S,
    }
    return run_streams(job)


def run_streams(job: Mapping[str, Any]) -> dict[str, Any]:
    """Raises BenchError if the load itself fails."""
    command = [sys.executable, str(ROOT / "bench" / "streams.py"), "load", json.dumps(job)]
    limit_s = job["timeout_s"] + job["spread_s"] + PATIENCE_S
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode:
        raise BenchError(f"the load of streams ended: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def without_faults(found: dict[str, Any]) -> dict[str, Any]:
    """Raises BenchError if a stream did not end well."""
    if found["faults"]:
        raise BenchError(f"{len(found['faults'])} streams broke: {found['faults'][0]}")
    return found


def hundred_streams(bench: Bench) -> Found:
    def measure(target: Target) -> Found:
        found = without_faults(streams(target, bench.settings.chunks, 0.02, 100, 0.5))
        names = ("delay p50 ms", "delay p99 ms", "first byte p50 ms")
        return {name: (None, found[name]) for name in names} | {"count": (None, found["chunks"])}

    return bench.both("stream", measure)


def one_stream(bench: Bench) -> Found:
    def measure(target: Target) -> Found:
        found = without_faults(streams(target, bench.settings.flood_chunks, 0, 1, 0))
        return {"MB/s": (None, found["MB/s"]), "count": (None, found["chunks"])}

    return bench.both("stream", measure)


def crowd(bench: Bench) -> Found:
    """500 streams at once: what counts is that they all end as they should."""

    def measure(target: Target) -> Found:
        found = streams(target, bench.settings.crowd_chunks, 0.1, 500, 1.0)
        return {
            "completed": (None, found["completed"]),
            "faults": (None, len(found["faults"])),
            "delay p99 ms": (None, found["delay p99 ms"]),
        }

    return bench.both("stream", measure)


# --- memory


def memory(bench: Bench) -> Found:
    """Of a daemon that is fresh; wrk runs until so many requests are through."""
    with bench.fresh_daemon("instant") as daemon:
        sizes_mb = []
        done = 0
        for goal in (bench.settings.requests // 2, bench.settings.requests):
            while done < goal:
                load = wrk.Load(MANY, bench.settings.seconds, chat())
                done += bench.wrk(load, daemon.target("instant")).requests
            sizes_mb.append(daemon.memory_mb("VmRSS"))
        half_mb, all_mb = sizes_mb
        return {
            "MB after all requests": (None, all_mb),
            "MB more than after half of them": (None, all_mb - half_mb),
            "MB at most": (None, daemon.memory_mb("VmHWM")),
        }


# --- large bodies


def bodies(bench: Bench) -> Found:
    found: Found = {}
    upstreams = {"sink": "", "parsing": ", upstream that reads JSON"}
    for name, size, times in (("200 kB", 200_000, 1), ("20 MB", BIG_BYTES, 3)):
        for model, where in upstreams.items():
            load = wrk.Load(1, times * bench.settings.seconds, large_chat(model, size))

            def measure(target: Target, load: wrk.Load = load) -> Found:
                return {"MB/s": (None, bench.wrk(load, target).rate * len(load.body) / 1e6)}

            found[f"{name}: MB/s{where}"] = bench.both(model, measure)["MB/s"]
    return found | peak_memory(bench)


def large_chat(model: str, size: int) -> bytes:
    """A conversation of about so many bytes, whose answer is wanted in one piece."""
    body = json.loads(chat_body(size))
    return json.dumps({**body, "model": model, "stream": False}).encode()


def peak_memory(bench: Bench) -> Found:
    """What one large body takes in a fresh daemon, in sizes of that body."""
    with bench.fresh_daemon("sink") as daemon:
        before_mb = daemon.memory_mb("VmRSS")
        body = large_chat("sink", BIG_BYTES)
        status, answer = ask(daemon.target("sink"), "POST", CHAT, body)
        if status != 200:
            raise BenchError(f"the daemon answers {status} to a body of 20 MB: {answer}")
        added_mb = daemon.memory_mb("VmHWM") - before_mb
    return {"20 MB: bodies in memory": (None, added_mb * 1e6 / len(body))}


# --- starts


def cold(bench: Bench) -> Found:
    """The real llama-server, by hand and through a daemon, with the same command line."""
    try:
        server, model = real_parts.llama_server_bin(), real_parts.tiny()
    except (RuntimeError, ImportError) as exc:
        raise BenchError(f"no real llama-server to be had: {exc}") from exc
    setup = Setup(bench.program, server, {"tiny": model}, 1, ("-c", "2048", "-t", "2"))
    folder = bench.folder / f"cold-{bench.round}"
    with running_daemon(setup, folder) as daemon:
        command = checked_command(setup, folder)
        request = chat("tiny", stream=True, max_tokens=4)
        health_ms, by_hand_ms = start_by_hand(command, folder, request)
        through_ms = first_byte_ms(Target(daemon.port), request)
    return {
        "first byte ms, against /health by hand": (health_ms, through_ms),
        "first byte ms, against the same by hand": (by_hand_ms, through_ms),
    }


def checked_command(setup: Setup, folder: Path) -> list[str]:
    """What the daemon would run for the model, on a port of our own."""
    done = subprocess.run(
        setup.command("check", "--model", "tiny", "--json"),
        env=setup.environment(folder, free_port()),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    command: list[str] = json.loads(done.stdout)["command"]
    command[command.index("--port") + 1] = str(free_port())
    return command


def start_by_hand(command: list[str], folder: Path, request: bytes) -> tuple[float, float]:
    """From the start to the first 200 of /health, and to the first byte of an answer."""
    port = int(command[command.index("--port") + 1])
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    environment = winsvc.child_environment(empty, {"LLAMA_API_KEY": "by-hand"})
    begun = time.monotonic()
    with started(command, environment, folder / "by-hand.log") as process:
        await_health(process, port, "llama-server")
        health_s = time.monotonic() - begun
        answer_ms = first_byte_ms(Target(port, "by-hand"), request)
    return health_s * 1e3, health_s * 1e3 + answer_ms


def first_byte_ms(target: Target, body: bytes) -> float:
    """Connecting included. Raises BenchError if the answer is no 200."""
    fields = [
        f"POST {CHAT} HTTP/1.1",
        f"Host: {HOST}:{target.port}",
        *(f"{name}: {value}" for name, value in target.headers().items()),
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    begun = time.monotonic()
    with socket.create_connection((HOST, target.port), PATIENCE_S) as sock:
        sock.sendall("".join(f"{field}\r\n" for field in [*fields, ""]).encode() + body)
        data = sock.recv(1 << 16)
        first_s = time.monotonic() - begun
        while sock.recv(1 << 16):
            pass  # the answer is read to its end: an early leave would be other work
    if not data.startswith(b"HTTP/1.1 200 "):
        raise BenchError(f"no answer: {data[:300]!r}")
    return first_s * 1e3


def start(bench: Bench) -> Found:
    """From nothing to the first 200 of /health; --help comes from a file, as if at once."""
    found: Found = {"ms of the script": (None, start_ms(bench, bench.program))}
    frozen = ROOT / "dist" / "llama-sidecar"
    if frozen.exists():
        found["ms of the frozen program"] = (None, start_ms(bench, frozen))
    return found


def start_ms(bench: Bench, program: Path) -> float:
    setup = dataclasses.replace(bench.setup("instant"), program=program)
    folder = bench.folder / f"start-{time.monotonic_ns()}"
    folder.mkdir()
    port = free_port()
    environment = setup.environment(folder, port)
    begun = time.monotonic()
    with started(setup.command(), environment, folder / "daemon.log") as process:
        while not answers_health(port):
            if process.poll() is not None or time.monotonic() - begun > PATIENCE_S:
                raise BenchError("the daemon did not come up")
            time.sleep(POLL_S)
        return (time.monotonic() - begun) * 1e3


# --- growth


def cost(bench: Bench, daemon: Daemon, load: wrk.Load) -> tuple[float, float]:
    """A request's median time and the daemon's processor time, both in us."""
    before_s = daemon.cpu_s()
    result = bench.wrk(load, daemon.target("instant"))
    return result.p50_us, (daemon.cpu_s() - before_s) / result.requests * 1e6


def growth(bench: Bench) -> Found:
    """One connection to the first of 1, 10 and 50 sidecars, each lot in a daemon of its own."""
    costs = {}
    for count in KNOWN[:: -1 if bench.round % 2 else 1]:
        models = [f"m{number}" for number in range(count)]
        daemon = bench.kept_daemon(f"of {count}", *models, max_sidecars=count)
        costs[count] = cost(bench, daemon, wrk.Load(1, bench.settings.seconds, chat("m0")))
    first, *others = KNOWN
    found: Found = {}
    for place, name in enumerate(("p50 us", "processor time us")):
        for count in others:
            pair = (costs[first][place], costs[count][place])
            found[f"{name} with {count} sidecars, against {first}"] = pair
    return found


def fields(bench: Bench) -> Found:
    """What a header that means nothing costs, and a flag that was judged before."""
    names = [f"X-Nothing-{number}: {'v' * 20}" for number in range(HEADERS)]
    flags = sum(word.startswith("-") for word in TWENTY_FLAGS.split())
    kinds = {
        "header": (HEADERS, tuple(names)),
        "flag": (flags, (f"X-Agent-Flags: {TWENTY_FLAGS}",)),
    }
    daemon = bench.kept_daemon("of fields", "instant")  # its flags start a second sidecar
    plain = cost(bench, daemon, wrk.Load(1, bench.settings.seconds, chat()))
    found: Found = {}
    for kind, (count, headers) in kinds.items():
        load = wrk.Load(1, bench.settings.seconds, chat(), headers=headers)
        for name, before, after in zip(
            ("us", "us of processor time"), plain, cost(bench, daemon, load), strict=True
        ):
            found[f"{name} for each {kind} of {count}"] = (None, (after - before) / count)
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    title: str
    measure: Callable[[Bench], Found]


ROWS: Mapping[str, Row] = {
    "one": Row("1 connection, keep-alive", one),
    "many": Row(f"{MANY} connections, keep-alive", many),
    "close": Row(f"{CLOSING} connections, a new one for each request", close),
    "joined": Row("1 connection, answer put together from 9 events", joined),
    "streams": Row("100 streams, a chunk every 20 ms", hundred_streams),
    "stream": Row(f"1 stream without delay, chunks of {CHUNK_BYTES} bytes", one_stream),
    "crowd": Row("500 streams at once", crowd),
    "memory": Row("memory of the daemon after 100,000 requests", memory),
    "cold": Row("cold start of the real llama-server", cold),
    "bodies": Row("large request bodies", bodies),
    "start": Row("start of the daemon to /health", start),
    "growth": Row("1 connection, by sidecars that the pool knows", growth),
    "fields": Row("1 connection, by headers and flags", fields),
}
