"""Every way a llama-server goes wrong, at every moment of its life.

A row of ROWS is one fault at one moment: what the client is told, and what the
pool looks like afterwards. What is no row has its reason in NO_SENSE. All rows
run in one daemon, a few at a time, each with a model of its own, while one more
model streams without end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import pool
from tests.daemon import (
    CHAT,
    SIGKILL,
    Daemon,
    free_port_range,
    is_alive,
    killed_by,
    running_daemon,
    wait_until,
)

FAULTS = (
    "killed",
    "hangs",
    "floods",
    "closes mid-chunk",
    "half a header, then closed",
    "half a header, then silence",
    "lies on /health",
    "exits with 0",
    "ignores terminate",
    "wrong port",
)
SIGSTOP = 19  # Windows has no name for it
MOMENTS = ("loading", "idle", "prefill", "mid-stream", "stopping")
FLOOD = 4 << 20  # bytes: many times what a pipe holds
AT_ONCE = 8  # rows that run at the same time
BYSTANDER = {"chunks": 1_000_000, "chunk_delay": 0.02}
ENVIRONMENT = {
    "MAX_SIDECARS": "60",
    "HEALTH_TIMEOUT_SECONDS": "4",
    "HEALTH_INTERVAL_SECONDS": "0.3",
    "LLAMA_SIDECAR_STALL_SECONDS": "4",
}


@dataclasses.dataclass(frozen=True)
class Told:
    """What the client sees: an error, a whole answer (status 200), or a stream cut short."""

    status: int
    code: str = ""
    words: str = ""
    is_cut: bool = False


FINE = Told(200)
CUT = Told(200, is_cut=True)
DELETED = Told(502, "upstream_failed", "deleted")

Do = Callable[[Daemon, str], object]


def nothing(_daemon: Daemon, _model: str) -> None:
    """What the fault takes is in the switches."""


def signal_child(number: int) -> Do:
    def send(daemon: Daemon, model: str) -> None:
        os.kill(daemon.starts(model)[-1]["pid"], number)

    return send


def open_gate(gate: str) -> Do:
    return lambda daemon, model: daemon.open_gate(model, gate)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One fault at one moment."""

    fault: str
    moment: str
    told: Told
    pid_after: str  # "same" or "new": who answers the next request
    start: Mapping[str, object] = dataclasses.field(default_factory=dict)  # the model's switches
    fake: Mapping[str, object] = dataclasses.field(default_factory=dict)  # those of the request
    first: Do = nothing  # before a stop
    do: Do = nothing  # once the moment has come
    note: str = ""  # tells two rows of one cell apart
    streams: bool = False
    is_in_time: bool = True  # a stop ends before the grace time is over

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.fault, self.moment, self.note)))


def loading(fault: str, told: Told, pid_after: str, **more: Any) -> Row:
    return Row(fault, "loading", told, pid_after, **more)


def idle(fault: str, pid_after: str, **more: Any) -> Row:
    return Row(fault, "idle", FINE, pid_after, **more)


def prefill(fault: str, told: Told, pid_after: str, **more: Any) -> Row:
    return Row(fault, "prefill", told, pid_after, **more)


def mid_stream(fault: str, told: Told, pid_after: str, **more: Any) -> Row:
    return Row(fault, "mid-stream", told, pid_after, streams=True, **more)


def stopping(fault: str, told: Told = FINE, **more: Any) -> Row:
    return Row(fault, "stopping", told, "new", **more)


FAILED_LOAD = "model_load_failed"
FAILED = "upstream_failed"
KILLED = killed_by(SIGKILL)
STUCK = "nothing has moved for"
SILENT = {"load_gate": True, "load_silent": True}
LIAR = {"health_status": 500, "health_gate": True}
CURT = {"health_half_header": True, "health_gate": True}
HALF_CLOSE = {"half_header": "close"}
HALF_HANG = {"half_header": "hang"}

ROWS = (
    loading(
        *("killed", Told(502, FAILED_LOAD, KILLED), "new"),
        start={"load_gate": True},
        do=signal_child(SIGKILL),
    ),
    loading("hangs", Told(504, "load_timeout", "was not ready"), "new", start=SILENT),
    loading("floods", FINE, "same", start={"flood_bytes": FLOOD}),
    loading(
        *("half a header, then closed", Told(502, FAILED_LOAD, "another program answers"), "new"),
        start={"health_half_header": True},
        note="to a probe",
    ),
    loading(
        *("lies on /health", Told(502, FAILED_LOAD, "another program answers"), "new"),
        start={"health_status": 200, "load_gate": True},
        note="ready, it says",
    ),
    loading(
        *("lies on /health", Told(504, "load_timeout", "status 500"), "new"),
        start={"health_status": 500},
        note="ill, it says",
    ),
    loading(
        *("exits with 0", Told(502, FAILED_LOAD, "exit code 0"), "new"),
        start={"exit_on_load": {"code": 0}},
    ),
    loading("wrong port", Told(504, "load_timeout", "silent"), "new", start={"bind_other_port": 1}),
    idle("killed", "new", do=signal_child(SIGKILL)),
    idle("hangs", "new", do=signal_child(SIGSTOP)),
    idle("floods", "same", start={"flood_bytes_when_ready": FLOOD}),
    idle("half a header, then closed", "same", start=CURT, do=open_gate("health_gate")),
    idle("lies on /health", "same", start=LIAR, do=open_gate("health_gate")),
    idle("exits with 0", "new", start={"exit_after_requests": 1}),
    prefill(
        *("killed", Told(502, FAILED, KILLED), "new"),
        fake={"answer_gate": True},
        do=signal_child(SIGKILL),
    ),
    prefill("hangs", Told(502, FAILED, STUCK), "new", fake={"answer_gate": True}),
    prefill(
        *("hangs", Told(502, FAILED, STUCK), "new"),
        fake={"answer_gate": True},
        do=signal_child(SIGSTOP),
        note="the whole process",
    ),
    prefill("floods", FINE, "same", fake={"flood_bytes_per_request": FLOOD}),
    prefill(
        "half a header, then closed", Told(502, FAILED, "within a message"), "same", fake=HALF_CLOSE
    ),
    prefill("half a header, then silence", Told(502, FAILED, STUCK), "new", fake=HALF_HANG),
    prefill(
        *("lies on /health", FINE, "same"),
        start=LIAR,
        fake={"prefill_seconds": 2},
        do=open_gate("health_gate"),
    ),
    prefill(
        *("exits with 0", Told(502, FAILED, "exit code 0"), "new"),
        fake={"die_before_answer": True, "die_code": 0},
    ),
    mid_stream("killed", CUT, "new", fake={"stream_gate": 2}, do=signal_child(SIGKILL)),
    mid_stream("hangs", CUT, "new", fake={"hang_mid_stream": 2}),
    mid_stream("floods", FINE, "same", fake={"flood_bytes_per_chunk": FLOOD // 4}),
    mid_stream("closes mid-chunk", CUT, "same", fake={"close_mid_chunk": 2}),
    dataclasses.replace(
        mid_stream("closes mid-chunk", Told(502, FAILED, "broke off"), "same"),
        fake={"close_mid_chunk": 2},
        streams=False,
        note="answer put together",
    ),
    mid_stream(
        *("lies on /health", FINE, "same"),
        start=LIAR,
        fake={"chunks": 6, "chunk_delay": 0.5},
        do=open_gate("health_gate"),
    ),
    mid_stream("exits with 0", CUT, "new", fake={"die_mid_stream": 2, "die_code": 0}),
    stopping("killed", start={"ignore_sigterm": True}, do=signal_child(SIGKILL)),
    stopping("hangs", first=signal_child(SIGSTOP), is_in_time=False),
    stopping("floods", start={"flood_bytes_when_told": FLOOD}),
    stopping("half a header, then silence", told=DELETED, fake=HALF_HANG),
    stopping("exits with 0"),
    stopping("ignores terminate", start={"ignore_sigterm": True}, is_in_time=False),
)

NO_CHUNK = "no chunk is on its way yet"
HEAD_IS_OUT = "the head is out already"
NOBODY_ASKS = "who is stopped is asked nothing any more"
A_HANG = "to a probe this is the same as to hang"
NOT_TOLD = "it is not told to end"
PORT_IS_CHOSEN = "a port is opened once, while loading"

NO_SENSE: Mapping[tuple[str, str], str] = {
    ("closes mid-chunk", "loading"): NO_CHUNK,
    ("closes mid-chunk", "idle"): NO_CHUNK,
    ("closes mid-chunk", "prefill"): NO_CHUNK,
    ("closes mid-chunk", "stopping"): "a stop begins with the daemon closing every connection",
    ("half a header, then closed", "mid-stream"): HEAD_IS_OUT,
    ("half a header, then closed", "stopping"): NOBODY_ASKS,
    ("half a header, then silence", "loading"): A_HANG,
    ("half a header, then silence", "idle"): A_HANG,
    ("half a header, then silence", "mid-stream"): HEAD_IS_OUT,
    ("lies on /health", "stopping"): NOBODY_ASKS,
    ("ignores terminate", "loading"): NOT_TOLD,
    ("ignores terminate", "idle"): NOT_TOLD,
    ("ignores terminate", "prefill"): NOT_TOLD,
    ("ignores terminate", "mid-stream"): NOT_TOLD,
    ("wrong port", "idle"): PORT_IS_CHOSEN,
    ("wrong port", "prefill"): PORT_IS_CHOSEN,
    ("wrong port", "mid-stream"): PORT_IS_CHOSEN,
    ("wrong port", "stopping"): PORT_IS_CHOSEN,
}


def test_every_fault_meets_every_moment_or_makes_no_sense_then() -> None:
    shown = {(row.fault, row.moment) for row in ROWS}
    assert not shown & set(NO_SENSE)
    assert shown | set(NO_SENSE) == set(itertools.product(FAULTS, MOMENTS))
    assert all(NO_SENSE.values())


# --- one row


class Bystander:
    """A stream of another model, read all the while."""

    def __init__(self, daemon: Daemon) -> None:
        self.events = 0
        self.broke: Exception | None = None
        body = {"model": "bystander", "stream": True, "messages": []}
        self._connection, self._response = daemon.send("POST", CHAT, body)
        self._is_wanted = True
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while self._is_wanted and (line := self._response.readline()):
                self.events += line.startswith(b"data: ")
        except (OSError, http.client.HTTPException) as exc:
            self.broke = exc

    def close(self) -> None:
        self._is_wanted = False
        self._thread.join(10)
        self._response.close()
        self._connection.close()

    def must_move(self) -> None:
        """Fails unless the one stream of the whole run brings more."""
        seen = self.events
        wait_until(lambda: self.events > seen + 3 or self.broke, "the other stream moves")
        assert self.broke is None


def model_of(row: Row) -> str:
    return f"m{ROWS.index(row)}"


def posts(daemon: Daemon, model: str) -> list[dict[str, Any]]:
    return [row for row in daemon.events(model, "request") if row["method"] == "POST"]


def probes(daemon: Daemon, model: str) -> list[dict[str, Any]]:
    """Those after the first request: while it loads there are many."""
    events = daemon.events(model, "request")
    first = next((n for n, row in enumerate(events) if row["method"] == "POST"), len(events))
    return [row for row in events[first:] if row["method"] == "GET"]


def rows_of(daemon: Daemon, model: str) -> list[dict[str, Any]]:
    return [row for row in daemon.sidecars() if row["model_id"] == model]


def state_of(daemon: Daemon, model: str) -> object:
    return next((row["state"] for row in rows_of(daemon, model)), "gone")


def ask(daemon: Daemon, row: Row) -> Told:
    """What a client sees of one request."""
    body = {"model": model_of(row), "messages": [], "stream": row.streams, "fake": row.fake}
    connection, response = daemon.send("POST", CHAT, body)
    with contextlib.closing(connection), response:
        try:
            data = response.read()
        except http.client.IncompleteRead:
            return Told(response.status, is_cut=True)
    if row.streams and response.status == 200:
        assert data.endswith(b"data: [DONE]\n\n")
        return FINE
    error = json.loads(data).get("error", {"code": "", "message": ""})
    return Told(response.status, error["code"], error["message"])


def must_be_told(told: Told, expected: Told) -> None:
    assert (told.status, told.code, told.is_cut) == (
        expected.status,
        expected.code,
        expected.is_cut,
    ), told
    assert expected.words in told.words


def pid_after_one_request(daemon: Daemon, model: str) -> int:
    status, _, body = daemon.chat(model)
    assert status == 200, body
    return int(body["echo"]["pid"])


def run_loading(daemon: Daemon, row: Row, threads: ThreadPoolExecutor) -> int:
    model = model_of(row)
    asked = threads.submit(ask, daemon, row)
    start = wait_until(lambda: daemon.starts(model), "it starts")[0]
    row.do(daemon, model)
    must_be_told(asked.result(60), row.told)
    return int(start["pid"])


def run_idle(daemon: Daemon, row: Row, threads: ThreadPoolExecutor) -> int:
    model = model_of(row)
    pid = pid_after_one_request(daemon, model)
    row.do(daemon, model)
    if row.pid_after == "new":
        wait_until(lambda: not is_alive(pid), "it is ended unasked", 60)
        wait_until(lambda: pid not in [r["pid"] for r in rows_of(daemon, model)], "it is noticed")
    else:
        seen = len(probes(daemon, model))
        many = pool.MAX_MISSED_PROBES + 1
        wait_until(lambda: len(probes(daemon, model)) > seen + many, "it is probed", 60)
    return pid


def run_in_flight(daemon: Daemon, row: Row, threads: ThreadPoolExecutor) -> int:
    model = model_of(row)
    pid = pid_after_one_request(daemon, model)
    asked = threads.submit(ask, daemon, row)
    wait_until(lambda: len(posts(daemon, model)) == 2, "the request has come")
    row.do(daemon, model)
    must_be_told(asked.result(60), row.told)
    return pid


def run_stopping(daemon: Daemon, row: Row, threads: ThreadPoolExecutor) -> int:
    model = model_of(row)
    pid = pid_after_one_request(daemon, model)
    asked = threads.submit(ask, daemon, row) if row.fake else None
    wait_until(lambda: len(posts(daemon, model)) == 1 + bool(row.fake), "the request has come")
    row.first(daemon, model)
    begun = time.monotonic()
    deleted = threads.submit(daemon.ask, "DELETE", f"/sidecars/{rows_of(daemon, model)[0]['hash']}")
    wait_until(lambda: state_of(daemon, model) in ("stopping", "gone"), "it is being stopped")
    row.do(daemon, model)
    assert deleted.result(60)[0] == 200
    assert not is_alive(pid)
    took_s = time.monotonic() - begun
    assert took_s < pool.STOP_GRACE_S if row.is_in_time else took_s > pool.STOP_GRACE_S - 0.5
    if asked:
        must_be_told(asked.result(60), row.told)
    return pid


RUN = {
    "loading": run_loading,
    "idle": run_idle,
    "prefill": run_in_flight,
    "mid-stream": run_in_flight,
    "stopping": run_stopping,
}


def run_row(daemon: Daemon, row: Row, bystander: Bystander, threads: ThreadPoolExecutor) -> None:
    """The fault, then the pool: nothing held, the next request served, others not disturbed."""
    model = model_of(row)
    pid = RUN[row.moment](daemon, row, threads)
    bystander.must_move()
    wait_until(lambda: not any(r["in_flight"] for r in rows_of(daemon, model)), "nothing is held")
    (daemon.folder / f"{model}.json").write_text("{}")  # whatever starts now behaves
    if row.pid_after == "new":
        wait_until(lambda: not is_alive(pid), "the faulty one is gone")
    answers: list[Any] = []
    wait_until(lambda: is_served(daemon, model, answers), "the pause after a failed load is over")
    status, _, body = answers[-1]
    assert status == 200, body
    assert (body["echo"]["pid"] == pid) == (row.pid_after == "same")
    (after,) = rows_of(daemon, model)
    assert (after["state"], after["pid"]) == ("ready", body["echo"]["pid"])
    wait_until(lambda: not any(r["in_flight"] for r in rows_of(daemon, model)), "nothing is held")


def is_served(daemon: Daemon, model: str, answers: list[Any]) -> bool:
    """Ask once more; False while a failed load of before is all that is told."""
    answers.append(daemon.chat(model))
    status, named, _ = answers[-1]
    return not (status in (502, 504) and "retry-after" in named)


# --- all of them


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[None]]]:
    """Every row, running: who wants to know waits for its future."""
    folder = tmp_path_factory.mktemp("faults")
    models = {model_of(row): row.start for row in ROWS} | {"bystander": BYSTANDER}
    environment = ENVIRONMENT | {"PORT_RANGE": free_port_range(100)}
    with (
        running_daemon(folder, models, **environment) as daemon,
        contextlib.closing(Bystander(daemon)) as bystander,
        ThreadPoolExecutor(2 * AT_ONCE) as clients,
        ThreadPoolExecutor(AT_ONCE) as runners,
    ):
        yield {str(row): runners.submit(run_row, daemon, row, bystander, clients) for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_fault_is_told_and_mended(row: Row, outcomes: Mapping[str, Future[None]]) -> None:
    outcomes[str(row)].result(110)
