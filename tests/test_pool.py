"""The pool over processes that misbehave: what is started, kept, refused and stopped, and when."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import pool
from pool import MOVES, Lease, LoadFailed, LoadTimeout, Pool, PoolConfig, Sidecar, State, Ticket
from tests.daemon import (
    CHAT,
    FAKE_SERVER,
    PATIENCE,
    SIGKILL,
    Daemon,
    free_port_range,
    is_alive,
    killed_by,
    running_daemon,
    wait_until,
)
from validator import SidecarSpec

FAILS = {"exit_on_load": {"code": 7, "message": "E ggml: no such tensor, says the fake"}}
HOSTILE = {
    "LLAMA_ARG_CTX_SIZE": "17",
    "LLAMA_ARG_PORT": "1",
    "LLAMA_API_KEY": "not-for-children",
    "LLAMA_CACHE": "/nowhere",
    "GGML_BACKEND_PATH": "/nowhere",
    "AIP_MODE": "PREDICTION",
    "HF_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "LD_PRELOAD": "",
}
MODELS: Mapping[str, Mapping[str, object]] = {
    "plain": {},
    "other": {},
    "slow": {"load_seconds": 0.3},
    "gated": {"load_gate": True},
    "dies-idle": {},
    "fails": FAILS | {"load_gate": True},
    "fails-at-once": FAILS,
    "never": {"load_silent": True, "never_ready": True},
    "chatty": {"flood_bytes_per_request": 1 << 20},
    "once": {"exit_after_requests": 1},
    "left": {"stream_gate": 2},
    "stdin": {"stdin_check": True},
    "to-delete": {},
    "to-delete-loading": {"load_gate": True},
    "to-delete-streaming": {"stream_gate": 2},
    "stubborn": {"ignore_sigterm": True},
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    env = {
        "MAX_SIDECARS": "20",
        "PORT_RANGE": free_port_range(40),
        "HEALTH_TIMEOUT_SECONDS": str(2 * PATIENCE),
        "CUDA_VISIBLE_DEVICES": "0",
    }
    folder = tmp_path_factory.mktemp("models")
    with running_daemon(folder, MODELS, **(env | HOSTILE)) as running:
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


class Bench:
    """A pool in this process, over fakes whose files lie in `folder`."""

    def __init__(self, folder: Path, changes: Mapping[str, object]) -> None:
        first, last = free_port_range().split("-")
        settings: dict[str, object] = {
            "server_bin": FAKE_SERVER,
            "ports": range(int(first), int(last) + 1),
            "max_sidecars": 2,
            "queue_size": 16,
            "load_silence_s": 10.0,
            "health_interval_s": 60.0,
            "private_dir": folder,
        }
        self.folder = folder
        self.config = PoolConfig(**(settings | dict(changes)))  # type: ignore[arg-type]
        self.pool = Pool(self.config)

    def spec(self, name: str, **switches: object) -> SidecarSpec:
        file = self.folder / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(switches))
        return SidecarSpec(name, file, (), ())

    def spec_with(self, context: int, owner: str = "", **switches: object) -> SidecarSpec:
        """The model "m" with a context of so many tokens, in a file that lists its own starts."""
        file = self.spec(f"m{context}", **switches).model_path
        words = ("--ctx-size", str(context)) if context else ()
        return SidecarSpec("m", file, words, words, (), context, owner)

    def lease(self, name: str, timeout_s: float = 15.0, *, pinned: bool = False) -> Lease:
        return self.pool.lease(self.spec(name), timeout_s, pinned=pinned)

    def use(self, name: str, *, pinned: bool = False) -> Sidecar:
        """One request, begun and ended."""
        with self.lease(name, pinned=pinned) as lease:
            return lease.sidecar

    def alive(self) -> set[str]:
        return {str(row["model_id"]) for row in self.pool.snapshot()}

    def lines(self, name: str, what: str) -> list[dict[str, object]]:
        file = self.folder / f"{name}.json.{what}"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def touch(self, name: str, gate: str) -> Path:
        file = self.folder / f"{name}.json.{gate}"
        file.touch()
        return file


@contextlib.contextmanager
def bench_in(folder: Path, **changes: object) -> Iterator[Bench]:
    bench = Bench(folder, changes)
    try:
        yield bench
    finally:
        bench.pool.close(0)


def answer_of(lease: Lease) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", lease.upstream.port, timeout=10)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {lease.upstream.api_key}"}
        connection.request("POST", CHAT, b"{}", headers)
        return connection.getresponse().status


def row_of(daemon: Daemon, model: str) -> dict[str, object]:
    return next((row for row in daemon.sidecars() if row["model_id"] == model), {})


def code_of(answer: object) -> object:
    assert isinstance(answer, dict), answer
    return answer["error"]["code"]


def begin_stream(daemon: Daemon, model: str) -> tuple[http.client.HTTPConnection, object]:
    """A stream of which the first event has come."""
    connection, response = daemon.send(
        "POST", CHAT, {"model": model, "stream": True, "messages": []}
    )
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    return connection, response


# --- starting and reusing


def test_the_first_request_starts_a_sidecar_and_the_next_reuses_it(daemon: Daemon) -> None:
    answers = [daemon.chat("plain") for _ in range(5)]
    assert [status for status, _, _ in answers] == [200] * 5
    assert [named["x-sidecar-start"] for _, named, _ in answers] == ["started"] + ["reused"] * 4
    assert len({body["echo"]["pid"] for _, _, body in answers}) == 1
    assert len(daemon.starts("plain")) == 1


def test_twenty_requests_for_one_cold_spec_start_one_process(
    daemon: Daemon, threads: ThreadPoolExecutor
) -> None:
    answers = list(threads.map(lambda _: daemon.chat("slow"), range(20)))
    assert [status for status, _, _ in answers] == [200] * 20
    assert len({body["echo"]["pid"] for _, _, body in answers}) == 1
    assert len(daemon.starts("slow")) == 1


def test_a_load_outlives_the_client_that_asked_for_it(daemon: Daemon) -> None:
    with daemon.connect() as sock:
        body = b'{"model":"gated","messages":[]}'
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
        )
        wait_until(lambda: daemon.starts("gated"), "the load began")
    wait_until(
        lambda: daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 0,
        "the client's place is free",
    )
    daemon.open_gate("gated", "load_gate")
    wait_until(lambda: row_of(daemon, "gated").get("state") == "ready", "the load went on")
    status, named, _ = daemon.chat("gated")
    assert (status, named["x-sidecar-start"]) == (200, "reused")
    assert len(daemon.starts("gated")) == 1


def test_a_child_that_dies_idle_is_noticed_at_once_and_started_anew(daemon: Daemon) -> None:
    pid = daemon.chat("dies-idle")[2]["echo"]["pid"]
    os.kill(pid, SIGKILL)
    wait_until(lambda: not row_of(daemon, "dies-idle"), "its row is gone unasked", 3)
    status, named, body = daemon.chat("dies-idle")
    assert (status, named["x-sidecar-start"]) == (200, "started")
    assert body["echo"]["pid"] != pid
    assert row_of(daemon, "dies-idle")["restarts"] == 1


# --- loads that fail


def test_every_waiter_of_a_crashed_load_hears_exit_code_and_last_lines(
    daemon: Daemon, threads: ThreadPoolExecutor
) -> None:
    futures = [threads.submit(daemon.chat, "fails") for _ in range(4)]
    wait_until(lambda: daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 4, "all four wait")
    daemon.open_gate("fails", "load_gate")
    for status, _, body in [future.result(20) for future in futures]:
        assert (status, code_of(body)) == (502, "model_load_failed")
        assert "exit code 7" in body["error"]["message"]
        assert "no such tensor, says the fake" in body["error"]["message"]
    assert len(daemon.starts("fails")) == 1


def test_a_spec_that_failed_is_refused_for_a_while_with_the_stored_reason(daemon: Daemon) -> None:
    first = daemon.chat("fails-at-once")
    assert first[0] == 502
    again = [daemon.chat("fails-at-once") for _ in range(3)]
    for status, named, body in again:
        assert (status, code_of(body)) == (502, "model_load_failed")
        assert "no such tensor, says the fake" in body["error"]["message"]
        assert int(named["retry-after"]) >= 1
    assert len(daemon.starts("fails-at-once")) == 1
    wait_until(
        lambda: daemon.chat("fails-at-once")[0] == 502 and len(daemon.starts("fails-at-once")) == 2,
        "after the pause it is tried again",
        5,
    )


def test_a_silent_load_ends_in_a_timeout(daemon: Daemon) -> None:
    status, _, body = daemon.chat("never")
    assert (status, code_of(body)) == (504, "load_timeout")
    pid = daemon.starts("never")[0]["pid"]
    wait_until(lambda: not is_alive(pid), "its process is gone", 3)


@pytest.mark.parametrize(
    ("switches", "is_served"),
    [
        ({"load_silent": True, "load_seconds": 2.5, "load_lines": 0.1}, True),
        ({"load_silent": True, "load_seconds": 2.5}, False),
        ({"load_seconds": 2.5}, False),
    ],
)
def test_a_load_lasts_as_long_as_it_shows_progress(
    tmp_path: Path, switches: dict[str, object], is_served: bool
) -> None:
    with bench_in(tmp_path, load_silence_s=1.0) as bench:
        bench.spec("m", **switches)
        with contextlib.nullcontext() if is_served else pytest.raises(LoadTimeout):
            assert bench.use("m").state is State.READY


def test_progress_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOAD_LIMIT_FACTOR", 2)
    with bench_in(tmp_path, load_silence_s=0.6) as bench:
        bench.spec("m", never_ready=True, load_lines=0.02)
        with pytest.raises(LoadTimeout, match="not ready after"):
            bench.use("m")


def test_a_child_that_dies_as_it_becomes_ready_is_a_failed_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = pool._probe

    def probe_then_kill(upstream: pool.Upstream) -> str:
        answer = probe(upstream)
        if answer == "ready":
            os.kill(int(str(bench.lines("m", "starts")[0]["pid"])), SIGKILL)
            reaper = f"reap-{bench.spec('m').hash}"
            wait_until(
                lambda: reaper not in [thread.name for thread in threading.enumerate()],
                "its end was seen before it was ready",
            )
        return answer

    monkeypatch.setattr(pool, "_probe", probe_then_kill)
    with bench_in(tmp_path) as bench:
        with pytest.raises(LoadFailed, match=killed_by(SIGKILL)):
            bench.use("m")
        wait_until(lambda: not bench.alive(), "its place is free")


# --- ports and keys


def test_a_port_that_somebody_holds_is_passed_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        free = int(free_port_range().split("-")[0])
        with bench_in(tmp_path, ports=(taken, free)) as bench, bench.lease("m") as lease:
            assert lease.sidecar.port == free
            assert answer_of(lease) == 200


def test_no_free_port_is_said_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        with bench_in(tmp_path, ports=range(taken, taken + 1)) as bench:
            with pytest.raises(LoadFailed, match="no free port"):
                bench.use("m")
            assert bench.lines("m", "starts") == []


def test_a_port_lost_at_the_last_moment_is_replaced_by_another(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        bench.spec("m", bind_error=2)
        with bench.lease("m") as lease:
            assert answer_of(lease) == 200
        assert len({start["port"] for start in bench.lines("m", "starts")}) == 3


@pytest.mark.parametrize("switch", ["no_key_check", "other_key"])
def test_a_server_that_does_not_know_our_key_is_never_ready(tmp_path: Path, switch: str) -> None:
    with bench_in(tmp_path, load_silence_s=1.0) as bench:
        bench.spec("m", **{switch: True})
        with pytest.raises(LoadTimeout, match="stranger"):
            bench.use("m")


def test_each_child_has_a_key_of_its_own_and_none_of_our_secrets(daemon: Daemon) -> None:
    daemon.chat("plain")
    daemon.chat("other")
    plain, other = (daemon.starts(name)[-1]["env"] for name in ("plain", "other"))
    assert len({plain["LLAMA_API_KEY"], other["LLAMA_API_KEY"], HOSTILE["LLAMA_API_KEY"]}) == 3
    kept = {"LLAMA_API_KEY", "CUDA_VISIBLE_DEVICES", "PATH"}
    assert kept <= set(plain)
    assert plain["CUDA_VISIBLE_DEVICES"] == "0"
    assert not (set(HOSTILE) | {"LLAMA_SERVER_BIN", "MODEL_DIR_MAP_FILE"}) & (set(plain) - kept)


# --- what a child needs to live


def test_a_child_that_floods_its_output_goes_on_answering(daemon: Daemon) -> None:
    answers = [daemon.chat("chatty") for _ in range(12)]
    assert [status for status, _, _ in answers] == [200] * 12
    assert len(daemon.starts("chatty")) == 1


def test_a_child_that_ends_after_each_answer_is_started_for_each_request(daemon: Daemon) -> None:
    for served in (1, 2, 3):
        assert daemon.chat("once")[0] == 200
        wait_until(lambda: not row_of(daemon, "once"), "its end is noticed", 5)
        assert len(daemon.starts("once")) == served


def test_a_child_outlives_the_request_that_started_it(daemon: Daemon) -> None:
    connection, response = begin_stream(daemon, "left")
    assert isinstance(response, http.client.HTTPResponse)
    response.close()
    connection.close()
    wait_until(lambda: daemon.events("left", "disconnect"), "the child hears of it")
    daemon.open_gate("left", "stream_gate")
    status, named, _ = daemon.chat("left")
    assert (status, named["x-sidecar-start"]) == (200, "reused")
    assert len(daemon.starts("left")) == 1


def test_a_child_has_no_input_and_a_session_of_its_own(daemon: Daemon) -> None:
    assert daemon.chat("stdin")[0] == 200
    start = daemon.starts("stdin")[0]
    assert start["stdin"] == "null"
    if sys.platform != "win32":  # test_winsvc.py has its like
        assert (start["leads_session"], start["leads_group"]) == (True, True)


# --- deleting


def hash_of(daemon: Daemon, model: str) -> str:
    return str(row_of(daemon, model)["hash"])


def test_a_deleted_sidecar_is_gone_when_the_answer_comes(daemon: Daemon) -> None:
    pid = daemon.chat("to-delete")[2]["echo"]["pid"]
    found = hash_of(daemon, "to-delete")
    status, _, body = daemon.ask("DELETE", f"/sidecars/{found}")
    assert (status, body) == (200, {"hash": found, "deleted": True})
    assert not is_alive(pid)
    assert row_of(daemon, "to-delete") == {}
    assert daemon.chat("to-delete")[1]["x-sidecar-start"] == "started"


@pytest.mark.parametrize("unknown", ["0123456789ab", "x", "%2e%2e"])
def test_an_unknown_hash_cannot_be_deleted(daemon: Daemon, unknown: str) -> None:
    status, _, body = daemon.ask("DELETE", f"/sidecars/{unknown}")
    assert (status, code_of(body)) == (404, "sidecar_not_found")


def test_deleting_a_loading_sidecar_ends_its_load_and_tells_who_waits(
    daemon: Daemon, threads: ThreadPoolExecutor
) -> None:
    waiting = threads.submit(daemon.chat, "to-delete-loading")
    starts = wait_until(lambda: daemon.starts("to-delete-loading"), "the load began")
    found = hash_of(daemon, "to-delete-loading")
    assert daemon.ask("DELETE", f"/sidecars/{found}")[0] == 200
    status, _, body = waiting.result(10)
    assert (status, code_of(body)) == (502, "upstream_failed")
    assert "deleted" in body["error"]["message"]
    assert not is_alive(starts[0]["pid"])


def test_deleting_a_streaming_sidecar_cuts_the_stream(daemon: Daemon) -> None:
    connection, response = begin_stream(daemon, "to-delete-streaming")
    assert isinstance(response, http.client.HTTPResponse)
    with contextlib.closing(connection), response:
        found = hash_of(daemon, "to-delete-streaming")
        assert daemon.ask("DELETE", f"/sidecars/{found}")[0] == 200
        with pytest.raises(http.client.IncompleteRead):
            response.read()


def test_a_child_that_ignores_terminate_is_killed_after_the_grace_time(daemon: Daemon) -> None:
    pid = daemon.chat("stubborn")[2]["echo"]["pid"]
    began = time.monotonic()
    assert daemon.ask("DELETE", f"/sidecars/{hash_of(daemon, 'stubborn')}")[0] == 200
    assert not is_alive(pid)
    assert pool.STOP_GRACE_S - 0.5 < time.monotonic() - began < pool.STOP_GRACE_S + 5


# --- making room


def test_the_victim_is_the_one_whose_last_request_ended_first(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        first = bench.lease("began-first-ended-last")
        bench.use("ended-first")
        with first:
            pass
        with bench.lease("new") as lease:
            assert lease.start_kind == "evicted"
            assert bench.alive() == {"began-first-ended-last", "new"}


def test_a_pinned_sidecar_is_never_a_victim(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        bench.use("pinned", pinned=True)
        for name in ("a", "b", "c"):
            bench.use(name)
            assert bench.alive() == {"pinned", name}


def test_a_leased_sidecar_is_never_a_victim(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench, bench.lease("held") as held:
        for name in ("a", "b", "c"):
            bench.use(name)
            assert bench.alive() == {"held", name}
        assert answer_of(held) == 200


def test_where_all_are_leased_a_request_waits_and_is_told_in_the_end(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=1) as bench, bench.lease("held") as held:
        with pytest.raises(pool.PoolBusy, match="busy"):
            bench.lease("cold", 0.2)
        assert bench.lines("cold", "starts") == []
        assert answer_of(held) == 200


def test_a_full_queue_refuses_the_next(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with bench_in(tmp_path, max_sidecars=1, queue_size=1) as bench:
        with bench.lease("held"):
            waiting = threads.submit(bench.use, "first")
            wait_until(lambda: bench.pool.counts()[1] == 1, "one waits")
            with pytest.raises(pool.QueueFull) as caught:
                bench.lease("second")
            assert caught.value.retry_after_s
        assert waiting.result(15).spec.model_id == "first"


def test_who_waits_longest_is_served_first(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    names = ["a", "b", "c", "d"]
    served: list[str] = []

    def ask(name: str) -> None:
        with bench.lease(name, 30):
            served.append(name)

    with bench_in(tmp_path, max_sidecars=1) as bench:
        futures: list[Future[None]] = []
        with bench.lease("held"):
            for count, name in enumerate(names, 1):
                futures.append(threads.submit(ask, name))
                wait_until(lambda count=count: bench.pool.counts()[1] == count, "it queues")  # type: ignore[misc]
        for future in futures:
            future.result(30)
    assert served == names


@pytest.mark.parametrize(("fair_wait_s", "is_drained"), [(0.2, True), (60.0, False)])
def test_a_busy_model_gives_way_once_a_cold_one_waited_its_fair_time(
    tmp_path: Path, threads: ThreadPoolExecutor, fair_wait_s: float, is_drained: bool
) -> None:
    with bench_in(tmp_path, max_sidecars=1, fair_wait_s=fair_wait_s) as bench:
        with bench.lease("busy") as busy:
            cold = threads.submit(bench.use, "cold")
            wait_until(lambda: bench.pool.counts()[1] == 1, "the cold one queues")
            if is_drained:
                wait_until(lambda: busy.sidecar.is_draining, "the busy one is to run dry", 5)
                again = threads.submit(bench.lease, "busy")
                wait_until(lambda: bench.pool.counts()[1] == 2, "more work for it waits")
            else:
                bench.use("busy")  # still taken at once
                again = threads.submit(bench.lease, "busy")
            if not is_drained:
                again.result(5).__exit__()
        assert cold.result(15).spec.model_id == "cold"
        if is_drained:
            with again.result(15) as lease:
                assert lease.start_kind == "evicted"


def test_a_cancelled_wait_frees_its_place_and_starts_nothing(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tickets: list[Ticket] = []
    with bench_in(tmp_path, max_sidecars=1, queue_size=1) as bench, bench.lease("held"):
        spec = bench.spec("cold")
        waiting = threads.submit(lambda: bench.pool.lease(spec, 20, on_wait=tickets.append))
        bench.pool.cancel(wait_until(lambda: tickets, "it waits")[0])
        with pytest.raises(pool.WaitCancelled):
            waiting.result(5)
        assert bench.pool.counts()[1] == 0
    assert bench.lines("cold", "starts") == []


def test_a_client_that_leaves_the_queue_frees_its_place(tmp_path: Path) -> None:
    models = {"held": {"stream_gate": 1}, "cold": {}}
    env = {"MAX_SIDECARS": "1", "LLAMA_SIDECAR_QUEUE_SIZE": "1"}
    with running_daemon(tmp_path, models, **env) as daemon:
        connection, _ = begin_stream(daemon, "held")
        with contextlib.closing(connection):
            with daemon.connect() as sock:
                body = b'{"model":"cold","messages":[]}'
                sock.sendall(
                    b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
                    b"Content-Type: application/json\r\n\r\n%b" % (CHAT.encode(), len(body), body)
                )
                wait_until(lambda: waiting_in(daemon) == 1, "it queues")
                assert code_of(daemon.chat("cold")[2]) == "queue_full"
            wait_until(lambda: waiting_in(daemon) == 0, "its place is free", 5)
        assert daemon.starts("cold") == []


def waiting_in(daemon: Daemon) -> int:
    return int(daemon.ask("GET", "/health")[2]["queue"]["waiting"])


# --- a larger context serves a smaller one


def lease_in(bench: Bench, spec: SidecarSpec, *, exact: bool = False) -> Lease:
    return bench.pool.lease(spec, 15, exact=exact)


def test_a_ready_sidecar_with_a_larger_context_is_used(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        large, small = bench.spec_with(8192), bench.spec_with(4096)
        with lease_in(bench, large):
            pass
        with lease_in(bench, small) as lease:
            assert lease.sidecar.spec is large
            assert (lease.start_kind, answer_of(lease)) == ("reused", 200)
        assert bench.lines("m4096", "starts") == []


def test_who_wants_it_exact_gets_a_process_of_its_own(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        with lease_in(bench, bench.spec_with(8192)):
            pass
        small = bench.spec_with(4096)
        with lease_in(bench, small, exact=True) as lease:
            assert lease.sidecar.spec is small
        with lease_in(bench, small) as lease:
            assert lease.sidecar.spec is small, "its own goes before a larger one"


@pytest.mark.parametrize(
    ("up", "asked"),
    [((4096, ""), (8192, "")), ((8192, ""), (0, "")), ((8192, ""), (4096, "ann"))],
    ids=["a smaller one", "one that is the model's own", "that of another owner"],
)
def test_no_other_sidecar_is_used(
    tmp_path: Path, up: tuple[int, str], asked: tuple[int, str]
) -> None:
    with bench_in(tmp_path) as bench:
        with lease_in(bench, bench.spec_with(*up)):
            pass
        wanted = bench.spec_with(*asked)
        with lease_in(bench, wanted) as lease:
            assert lease.sidecar.spec is wanted


def test_of_several_larger_ones_the_smallest_that_is_ready_is_used(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path, max_sidecars=4) as bench:
        for context in (32768, 16384):
            with lease_in(bench, bench.spec_with(context), exact=True):
                pass
        loading = bench.spec_with(8192, load_gate=True)
        waiting = threads.submit(lease_in, bench, loading, exact=True)
        wait_until(lambda: bench.lines("m8192", "starts"), "a smaller one loads")
        with lease_in(bench, bench.spec_with(4096)) as lease:
            assert lease.sidecar.spec.context == 16384
        bench.touch("m8192", "load_gate")
        with waiting.result(15), lease_in(bench, bench.spec_with(4096)) as lease:
            assert lease.sidecar.spec.context == 8192


def test_a_larger_one_that_loads_is_waited_for(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with bench_in(tmp_path) as bench:
        large = bench.spec_with(8192, load_gate=True)
        first = threads.submit(lease_in, bench, large)
        wait_until(lambda: bench.lines("m8192", "starts"), "it loads")
        second = threads.submit(lease_in, bench, bench.spec_with(4096))
        wait_until(lambda: bench.pool.counts()[1] == 2, "both wait")
        bench.touch("m8192", "load_gate")
        with first.result(15), second.result(15) as lease:
            assert lease.sidecar.spec is large
        assert bench.lines("m4096", "starts") == []


def test_where_the_larger_one_fails_to_load_the_smaller_gets_its_own_start(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path, max_sidecars=1) as bench:
        large = bench.spec_with(8192, exit_on_load=FAILS["exit_on_load"], load_gate=True)
        small = bench.spec_with(4096)
        first = threads.submit(lease_in, bench, large)
        wait_until(lambda: bench.lines("m8192", "starts"), "it loads")
        second = threads.submit(lease_in, bench, small)
        wait_until(lambda: bench.pool.counts()[1] == 2, "both wait")
        bench.touch("m8192", "load_gate")
        with pytest.raises(LoadFailed, match="exit code 7"):
            first.result(15)
        with second.result(15) as lease:
            assert lease.sidecar.spec is small
            assert answer_of(lease) == 200


def test_where_the_larger_one_is_deleted_as_it_loads_the_smaller_gets_its_own_start(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path) as bench:
        large, small = bench.spec_with(8192, load_gate=True), bench.spec_with(4096)
        first = threads.submit(lease_in, bench, large)
        wait_until(lambda: bench.lines("m8192", "starts"), "it loads")
        second = threads.submit(lease_in, bench, small)
        wait_until(lambda: bench.pool.counts()[1] == 2, "both wait")
        bench.pool.remove(large.hash)
        with pytest.raises(pool.UpstreamFailed, match="deleted"):
            first.result(15)
        with second.result(15) as lease:
            assert lease.sidecar.spec is small


def test_a_larger_one_that_is_being_stopped_is_not_waited_for(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path) as bench:
        large, small = bench.spec_with(8192, ignore_sigterm=True), bench.spec_with(4096)
        with lease_in(bench, large) as lease:
            stopping = lease.sidecar
        removal = threads.submit(bench.pool.remove, large.hash)
        wait_until(lambda: stopping.state is State.STOPPING, "it is being stopped")
        with lease_in(bench, small) as lease:
            assert stopping.state is State.STOPPING, "it was not over before the other was up"
            assert lease.sidecar.spec is small
        removal.result(20)


def test_a_larger_one_that_runs_dry_takes_no_smaller_work(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path, max_sidecars=1, fair_wait_s=0.2) as bench:
        large, small = bench.spec_with(8192), bench.spec_with(4096)
        with lease_in(bench, large) as busy:
            cold = threads.submit(bench.use, "cold")
            wait_until(lambda: busy.sidecar.is_draining, "the busy one is to run dry")
            again = threads.submit(lease_in, bench, small)
            wait_until(lambda: bench.pool.counts()[1] == 2, "the smaller one waits")
            assert not again.done()
        assert cold.result(15).spec.model_id == "cold"
        with again.result(15) as lease:
            assert lease.sidecar.spec is small


def test_where_one_larger_runs_dry_another_takes_the_smaller_work(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path, fair_wait_s=0.2) as bench:
        smaller = lease_in(bench, bench.spec_with(8192))
        with lease_in(bench, bench.spec_with(16384)) as largest:
            with smaller:
                cold = threads.submit(bench.use, "cold")
                wait_until(lambda: smaller.sidecar.is_draining, "the least used is to run dry")
                with lease_in(bench, bench.spec_with(4096)) as lease:
                    assert lease.sidecar is largest.sidecar
            assert cold.result(15).spec.model_id == "cold"


def test_a_larger_one_that_need_not_run_dry_any_more_takes_smaller_work_again(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tickets: list[Ticket] = []
    with bench_in(tmp_path, max_sidecars=1, fair_wait_s=0.2) as bench:
        large, small = bench.spec_with(8192), bench.spec_with(4096)
        with lease_in(bench, large) as busy:
            cold = bench.spec("cold")
            waiting = threads.submit(lambda: bench.pool.lease(cold, 20, on_wait=tickets.append))
            wait_until(lambda: busy.sidecar.is_draining, "the busy one is to run dry")
            again = threads.submit(lease_in, bench, small)
            wait_until(lambda: bench.pool.counts()[1] == 2, "the smaller one waits")
            bench.pool.cancel(tickets[0])
            with pytest.raises(pool.WaitCancelled):
                waiting.result(5)
            with again.result(10) as lease:
                assert lease.sidecar is busy.sidecar


def test_who_waits_for_one_that_runs_dry_is_not_told_that_it_loads(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench, bench.lease("m") as lease:
        lease.sidecar.is_draining = True
        waiting = pool.Ticket(bench.spec("m"), False, time.monotonic(), math.inf)
        assert bench.pool.progress(waiting).startswith("waiting for a place, 0 ahead")


# --- health


def health_probes(bench: Bench, name: str) -> int:
    rows = bench.lines(name, "events")
    return sum(row["event"] == "request" and row["target"] == "/slots" for row in rows)


def test_an_idle_child_that_answers_no_probe_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PROBE_TIMEOUT_S", 0.3)
    with bench_in(tmp_path, health_interval_s=0.05) as bench:
        bench.spec("m", health_gate=True, health_hangs=True)
        stuck = bench.use("m")
        gate = bench.touch("m", "health_gate")
        wait_until(lambda: stuck.state is State.GONE, "the stuck one is ended", 10)
        gate.unlink()
        wait_until(lambda: len(bench.lines("m", "starts")) == 2, "another is started unasked", 10)
        with bench.lease("m") as lease:
            assert lease.sidecar is not stuck
            assert answer_of(lease) == 200


def test_an_idle_child_that_answers_anything_at_all_is_left_alone(tmp_path: Path) -> None:
    with bench_in(tmp_path, health_interval_s=0.02) as bench:
        bench.spec("m", health_gate=True, health_status=500)
        odd = bench.use("m")
        bench.touch("m", "health_gate")
        seen = health_probes(bench, "m")
        wait_until(
            lambda: health_probes(bench, "m") > seen + 3 * pool.MAX_MISSED_PROBES, "many probes"
        )
        assert odd.state is State.READY


# --- states


LEGAL = {
    (State.STARTING, State.READY),
    (State.STARTING, State.STOPPING),
    (State.STARTING, State.FAILED),
    (State.READY, State.STOPPING),
    (State.READY, State.GONE),
    (State.STOPPING, State.GONE),
    (State.FAILED, State.GONE),
}


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_a_sidecar_moves_only_along_the_table(tmp_path: Path, before: State, after: State) -> None:
    assert set(MOVES) == set(State)
    with bench_in(tmp_path) as bench:
        sidecar = Sidecar(bench.spec("m"), 1, "started", 0, pinned=False)
        sidecar.state = before
        is_legal = (before, after) in LEGAL
        illegal = pytest.raises(AssertionError, match="cannot become")
        with bench.pool._changed, contextlib.nullcontext() if is_legal else illegal:
            bench.pool._move_locked(sidecar, after)
        assert sidecar.state is (after if is_legal else before)


def test_a_closed_pool_leaves_no_process_and_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with bench_in(tmp_path) as bench:
        pids = [bench.use(name).pid for name in ("a", "b")]
    assert not any(is_alive(pid) for pid in pids if pid)
    with pytest.raises(pool.PoolClosed):
        bench.lease("a")
    wait_until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - before
                if not thread.name.startswith("spawner")
            ]
        ),
        "its threads end",
        5,
    )
