#!/usr/bin/env python3
"""What the daemon adds to a request: direct to a llama-server, and through the daemon.

    python bench/proxy_overhead.py [--quick] [--rounds N] [--json FILE]

The upstream is tests/fake_llama_server.py, started by the daemon; direct requests
go to that same process, with the key that the daemon gave it (the fake writes its
environment to FILE.starts). So both ways meet one upstream, in one run, by turns.

Whole answers are measured at 1, 8 and 64 keep-alive connections, each of which
sends its next request when it has its answer. Streams are measured one at a time
and 100 at once, a word every 20 ms, their starts spread over the length of one.

Percentiles are over all requests of a round (a p99 of few is their maximum; the
JSON file says of how many under "samples"). "direct" and "proxied" are medians
over the rounds; "added" and "ratio" are medians of the difference and quotient of
the two halves of a round. The load comes from processes of its own, but shares
the cores with daemon and upstream: compare numbers of one machine only.

Needs POSIX: the fake is started by its first line, as an executable.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests" / "fake_llama_server.py"
HOST = "127.0.0.1"

CONNECTIONS = (1, 8, 64)
STREAMS = (1, 100)
WAYS = ("direct", "proxied")
CHUNK_DELAY_S = 0.02
WORDS = 5  # in a whole answer
KEEPALIVE_MAX = 1_000_000_000  # the real one closes after 100 requests: that would be measured too

LEAD_S = 0.3  # from giving out a job to its first request: time to connect
PATIENCE_S = 30.0  # for any one thing to happen
STOP_S = 15.0  # more than the daemon gives its children
RANGE_PORTS = 10
RECV_BYTES = 1 << 16

Samples = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of one half of a round, and how many samples it comes from."""

    value: float
    samples: int


Measures = dict[str, Measure]


class Pipe(Protocol):
    """One end of a multiprocessing pipe, whose class has another name on each platform."""

    def send(self, obj: Any, /) -> None: ...
    def recv(self) -> Any: ...
    def poll(self, timeout: float, /) -> bool: ...
    def close(self) -> None: ...


class BenchError(Exception):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often; all loads of a run share them."""

    rounds: int = 5
    seconds: float = 2.0  # measured, of each half of a round
    warm_s: float = 0.3  # before that, not measured
    words: int = 25  # in a stream
    streams_each: int = 4  # one after the other, on each connection


QUICK = Settings(rounds=1, seconds=0.4, warm_s=0.1, words=15, streams_each=1)


@dataclasses.dataclass(frozen=True)
class Load:
    """So many connections at once, for whole answers or for streams."""

    connections: int
    is_stream: bool

    @property
    def name(self) -> str:
        noun = "stream" if self.is_stream else "connection"
        return f"{self.connections} {noun}{'s' if self.connections > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class Target:
    """Where requests go; `key` is empty where none is asked for."""

    port: int
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One generator's part of a half round; times are of time.monotonic()."""

    port: int
    request: bytes
    starts: tuple[float, ...]  # a connection's first request, ascending
    measure_from: float
    measure_until: float  # whole answers: no request begins after it
    words: int  # 0: whole answers
    streams_each: int
    deadline: float


# ---------------------------------------------------------------- the generators


class Client:
    """One keep-alive connection, with one request under way at a time."""

    def __init__(self, job: Job, start_at: float, samples: Samples) -> None:
        self.job = job
        self.start_at = start_at
        self.samples = samples
        self.sock = socket.create_connection((HOST, job.port), timeout=PATIENCE_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> None:
        self.buffer = bytearray()
        self.sent_at = time.monotonic()
        self.sock.sendall(self.job.request)

    def receive(self) -> bool:
        """Take what has arrived; True if it ends the answer."""
        data = self.sock.recv(RECV_BYTES)
        now = time.monotonic()
        is_first = not self.buffer
        self.buffer += data
        if not data:
            raise BenchError(f"closed after {len(self.buffer)} bytes of an answer")
        if not self.buffer.startswith(b"HTTP/1.1 200 "[: len(self.buffer)]):
            raise BenchError(f"not an answer: {bytes(self.buffer[:600])!r}")
        return self._take(data, now, is_first)

    def has_more(self) -> bool:
        raise NotImplementedError

    def _take(self, data: bytes, now: float, is_first: bool) -> bool:
        raise NotImplementedError


class WholeClient(Client):
    """Asks again until the measured time is over."""

    def has_more(self) -> bool:
        return time.monotonic() < self.job.measure_until

    def _take(self, data: bytes, now: float, is_first: bool) -> bool:
        head_bytes = self.buffer.find(b"\r\n\r\n") + 4
        if head_bytes < 4 or len(self.buffer) < head_bytes + self._content_length(head_bytes):
            return False
        if self.job.measure_from <= now <= self.job.measure_until:
            self.samples["latency"].append(now - self.sent_at)
        return True

    def _content_length(self, head_bytes: int) -> int:
        _, found, rest = bytes(self.buffer[:head_bytes]).lower().partition(b"content-length:")
        if not found:
            raise BenchError(f"an answer without Content-Length: {bytes(self.buffer[:600])!r}")
        return int(rest.partition(b"\r\n")[0])


class StreamClient(Client):
    """Reads so many streams, one after the other."""

    streams = 0

    def send(self) -> None:
        self.arrivals: list[float] = []  # of each event, to the blank line that ends it
        self.last_byte = b""
        super().send()

    def has_more(self) -> bool:
        return self.streams < self.job.streams_each

    def _take(self, data: bytes, now: float, is_first: bool) -> bool:
        if is_first:
            self.samples["first_byte"].append(now - self.sent_at)
        events = (self.last_byte + data).count(b"\n\n")
        self.arrivals.extend([now] * events)
        self.last_byte = data[-1:]
        if not self.buffer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            return False
        self._end()
        return True

    def _end(self) -> None:
        # Event 0 names the role; one for each word; then the finish reason and [DONE].
        of_words = self.arrivals[1 : self.job.words + 1]
        if len(of_words) < self.job.words:
            raise BenchError(f"a stream of {len(of_words)} words instead of {self.job.words}")
        self.samples["gap"].extend(b - a for a, b in itertools.pairwise(of_words))
        self.streams += 1


def perform(job: Job) -> Samples:
    """Everything the job asks for; blocks until its deadline at most."""
    samples: Samples = {"first_byte": [], "gap": []} if job.words else {"latency": []}
    kind = StreamClient if job.words else WholeClient
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        clients: list[Client] = [kind(job, start_at, samples) for start_at in job.starts]
        for client in clients:
            stack.enter_context(client.sock)
            selector.register(client.sock, selectors.EVENT_READ, client)
        drive(selector, clients, job.deadline)
    return samples


def drive(selector: selectors.BaseSelector, waiting: list[Client], deadline: float) -> None:
    """Start each client at its time and keep it busy until it has no more to ask."""
    busy = 0
    while busy or waiting:
        now = time.monotonic()
        if now > deadline:
            raise BenchError(f"{busy} requests without an answer, {len(waiting)} not begun")
        while waiting and waiting[0].start_at <= now:
            waiting.pop(0).send()
            busy += 1
        next_at = waiting[0].start_at if waiting else deadline
        for key, _ in selector.select(max(0.0, next_at - now)):
            client: Client = key.data
            if not client.receive():
                continue
            if client.has_more():
                client.send()
            else:
                busy -= 1
                selector.unregister(client.sock)


def generate(jobs: Pipe) -> None:
    """A generator's life: a job in, its samples or the reason why there are none out."""
    while True:
        try:
            job: Job = jobs.recv()
        except EOFError:
            return
        try:
            answer: Samples | str = perform(job)
        except (BenchError, OSError) as exc:
            answer = f"{type(exc).__name__}: {exc}"
        jobs.send(answer)


class Generators:
    """Processes that make the load, each with a part of the connections."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Pipe] = []
        self.processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=generate, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Generators:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(1)
            if process.is_alive():
                process.terminate()
                process.join(STOP_S)

    def run(self, load: Load, target: Target, settings: Settings) -> Samples:
        """One half of a round. Raises BenchError if any answer is not as it should be."""
        total: Samples = {}
        jobs = self._share_out(load, target, settings)
        for pipe, job in zip(self.pipes, jobs, strict=False):
            pipe.send(job)
        for pipe, job in zip(self.pipes, jobs, strict=False):
            for name, values in self._collect(pipe, job.deadline).items():
                total.setdefault(name, []).extend(values)
        return total

    def _collect(self, pipe: Pipe, deadline: float) -> Samples:
        if not pipe.poll(max(0.0, deadline - time.monotonic()) + PATIENCE_S):
            raise BenchError("a load generator does not answer")
        try:
            answer: Samples | str = pipe.recv()
        except EOFError as exc:
            raise BenchError("a load generator ended") from exc
        if isinstance(answer, str):
            raise BenchError(answer)
        return answer

    def _share_out(self, load: Load, target: Target, settings: Settings) -> list[Job]:
        start = time.monotonic() + LEAD_S
        measure_from = start + settings.warm_s
        stream_s = settings.words * CHUNK_DELAY_S
        spread_s = stream_s if load.is_stream else 0.0
        starts = [start + spread_s * n / load.connections for n in range(load.connections)]
        used = min(len(self.pipes), load.connections)
        return [
            Job(
                port=target.port,
                request=request_for(load, target, settings),
                starts=tuple(starts[first::used]),
                measure_from=measure_from,
                measure_until=measure_from + settings.seconds,
                words=settings.words if load.is_stream else 0,
                streams_each=settings.streams_each,
                deadline=start + settings.seconds + stream_s * settings.streams_each + PATIENCE_S,
            )
            for first in range(used)
        ]


def request_for(load: Load, target: Target, settings: Settings) -> bytes:
    payload = {
        "model": "fake",
        "messages": [{"role": "user", "content": "Count, please."}],
        "max_tokens": settings.words if load.is_stream else WORDS,
        "stream": load.is_stream,
    }
    body = json.dumps(payload).encode()
    fields = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {HOST}:{target.port}",
        *([f"Authorization: Bearer {target.key}"] if target.key else []),
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "".join(field + "\r\n" for field in [*fields, ""]).encode() + body


# ------------------------------------------------------- the daemon and its child


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports() -> list[int]:
    """Neighbours that nothing listens on, below those that the system gives away."""
    for first in range(18500, 32000, RANGE_PORTS + 1):
        ports = list(range(first, first + RANGE_PORTS + 1))
        if all(is_free(port) for port in ports):
            return ports
    raise BenchError("no free range of ports")


def daemon_environment(folder: Path, bind: int, first: int, last: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    python_folder = str(Path(sys.executable).parent)  # the fake's first line asks PATH for python3
    return {
        **kept,
        "PATH": os.pathsep.join([python_folder, kept.get("PATH", os.defpath)]),
        "LLAMA_SERVER_BIN": str(FAKE),
        "MODEL_DIR_MAP_FILE": str(folder / "models.json"),
        "LLAMA_SIDECAR_BIND": f"{HOST}:{bind}",
        "PORT_RANGE": f"{first}-{last}",
        "MAX_SIDECARS": "1",
        "BASE_ARGS": "[]",
    }


def write_models(folder: Path) -> Path:
    """The model map, and the fake's model file beside it, which is returned."""
    model = folder / "fake.json"
    switches = {"no_events": True, "chunk_delay": CHUNK_DELAY_S, "keepalive_max": KEEPALIVE_MAX}
    model.write_text(json.dumps(switches))
    (folder / "models.json").write_text(json.dumps({"fake": model.name}))
    return model


@contextlib.contextmanager
def running_daemon(program: Path, folder: Path) -> Iterator[Target]:
    """The daemon, up and without a child yet; it and its children are ended on the way out."""
    bind, first, *_, last = free_ports()
    model = write_models(folder)
    python = [sys.executable] if program.suffix == ".py" else []
    log = folder / "daemon.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*python, str(program)],
            env=daemon_environment(folder, bind, first, last),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_up(process, bind)
        yield Target(bind)
    except BenchError as exc:
        tail = "\n".join(log.read_text(errors="backslashreplace").splitlines()[-15:])
        raise BenchError(f"{exc}\nThe daemon's last lines:\n{tail}") from exc
    finally:
        stop(process)
        end_leftovers(model)


def wait_until_up(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the daemon ended with exit code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1) as sock:
            sock.settimeout(1)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: %s\r\n\r\n" % f"{HOST}:{port}".encode())
            if sock.recv(RECV_BYTES).startswith(b"HTTP/1.1 200 "):
                return
        time.sleep(0.05)
    raise BenchError(f"no 200 from the daemon's /health within {PATIENCE_S:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)


def starts_of(model: Path) -> list[dict[str, object]]:
    """What the fake wrote of each of its starts."""
    try:
        lines = Path(f"{model}.starts").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def end_leftovers(model: Path) -> None:
    """End each child that outlived the daemon, if its pid is still that child's."""
    for start in starts_of(model):
        pid = start["pid"]
        with contextlib.suppress(OSError):
            if isinstance(pid, int) and str(model) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGTERM)


def child_of(model: Path) -> Target:
    """The one child that the daemon started for the model, with its key."""
    starts = starts_of(model)
    if len(starts) != 1:
        raise BenchError(f"the daemon started {len(starts)} children instead of one")
    port, env = starts[0]["port"], starts[0]["env"]
    if not isinstance(port, int) or not isinstance(env, dict):
        raise BenchError(f"{model}.starts is not as the fake writes it")
    return Target(port, env.get("LLAMA_API_KEY", ""))


# ------------------------------------------------------------------- the measures


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def measure(samples: Samples, settings: Settings) -> Measures:
    """Percentiles in milliseconds of every kind of sample, and the rate of whole answers."""
    found: Measures = {}
    if "latency" in samples:
        answers = len(samples["latency"])
        found["requests/s"] = Measure(answers / settings.seconds, answers)
    for name, values in samples.items():
        if not values:
            raise BenchError(f"nothing was measured in {settings.seconds} s")
        for percent in (50, 99):
            value_ms = percentile(values, percent) * 1000
            found[f"{name.replace('_', ' ')} p{percent} ms"] = Measure(value_ms, len(values))
    return found


def run_round(
    generators: Generators,
    load: Load,
    ways: dict[str, Target],
    settings: Settings,
) -> dict[str, Measures]:
    """Both ways, in the order given."""
    return {
        way: measure(generators.run(load, target, settings), settings)
        for way, target in ways.items()
    }


def summarize(load: Load, rounds: list[dict[str, Measures]]) -> list[dict[str, object]]:
    """A row for each measure of the load."""
    rows: list[dict[str, object]] = []
    for name in rounds[0]["direct"]:
        direct = [found["direct"][name].value for found in rounds]
        proxied = [found["proxied"][name].value for found in rounds]
        pairs = list(zip(direct, proxied, strict=True))
        rows.append(
            {
                "load": load.name,
                "measure": name,
                "direct": statistics.median(direct),
                "proxied": statistics.median(proxied),
                "added": statistics.median(through - past for past, through in pairs),
                "ratio": statistics.median(through / past for past, through in pairs),
                "rounds": {"direct": direct, "proxied": proxied},
                "samples": {way: [found[way][name].samples for found in rounds] for way in WAYS},
            }
        )
    return rows


def run_all(
    generators: Generators, ways: dict[str, Target], settings: Settings
) -> list[dict[str, object]]:
    """Every load in every round; the way that goes first changes from round to round."""
    loads = [Load(count, is_stream=False) for count in CONNECTIONS]
    loads += [Load(count, is_stream=True) for count in STREAMS]
    found: dict[Load, list[dict[str, Measures]]] = {load: [] for load in loads}
    for number in range(settings.rounds):
        order = dict(list(ways.items())[:: -1 if number % 2 else 1])
        for load in loads:
            print(f"round {number + 1}/{settings.rounds}: {load.name}", file=sys.stderr)
            found[load].append(run_round(generators, load, order, settings))
    return [row for load in loads for row in summarize(load, found[load])]


def bench(program: Path, generator_count: int, settings: Settings) -> list[dict[str, object]]:
    with (
        tempfile.TemporaryDirectory(prefix="proxy-overhead-") as name,
        Generators(generator_count) as generators,
        running_daemon(program, Path(name)) as proxied,
    ):
        # The first request starts the child; neither it nor the first stream is measured.
        for is_stream in (False, True):
            generators.run(Load(1, is_stream), proxied, QUICK)
        ways = {"direct": child_of(Path(name) / "fake.json"), "proxied": proxied}
        rows = run_all(generators, ways, settings)
        child_of(Path(name) / "fake.json")  # still the only one
        return rows


# --------------------------------------------------------------------- the report


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def circumstances(
    program: Path, generator_count: int, settings: Settings, seconds: float
) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
        },
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--porcelain").splitlines(),
        "daemon": str(program),
        "generators": generator_count,
        "settings": {**dataclasses.asdict(settings), "chunk_delay_s": CHUNK_DELAY_S},
        "took_s": round(seconds, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    layout = "{:<15} {:<18} {:>10} {:>10} {:>10} {:>7}"
    lines = [layout.format("load", "measure", "direct", "proxied", "added", "ratio")]
    last_load: object = None
    for row in rows:
        numbers = [f"{row[column]:.2f}" for column in ("direct", "proxied", "added", "ratio")]
        load = "" if row["load"] == last_load else str(row["load"])
        lines.append(layout.format(load, str(row["measure"]), *numbers))
        last_load = row["load"]
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ROOT / ".cache" / "bench" / "proxy_overhead.json"
    cores = os.cpu_count() or 1
    count = max(1, min(4, cores // 2))
    parser.add_argument("--json", type=Path, default=default, metavar="FILE")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 5, or 1 if quick")
    parser.add_argument("--quick", action="store_true", help="ten seconds, to see that it works")
    parser.add_argument("--generators", type=int, default=count, metavar="N", help="processes")
    program = ROOT / "llama_sidecar.py"
    parser.add_argument("--daemon", type=Path, default=program, metavar="FILE", help=".py or .exe")
    options = parser.parse_args(argv)
    if options.generators < 1 or (options.rounds is not None and options.rounds < 1):
        parser.error("--rounds and --generators take whole numbers from 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every `finally`
    settings = QUICK if options.quick else Settings()
    if options.rounds:
        settings = dataclasses.replace(settings, rounds=options.rounds)
    began = time.monotonic()
    try:
        rows = bench(options.daemon, options.generators, settings)
    except BenchError as exc:
        print(f"proxy_overhead: {exc}", file=sys.stderr)
        return 1
    about = circumstances(options.daemon, options.generators, settings, time.monotonic() - began)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**about, "results": rows}, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
