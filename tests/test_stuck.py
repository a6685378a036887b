"""Children that hang, that run out of memory, that keep failing; ports that are not theirs."""

from __future__ import annotations

import contextlib
import errno
import http.client
import http.server
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import pool
import winsvc
from pool import Lease, LoadFailed, LoadTimeout, OutOfDescriptors, PoolBusy, Sidecar, State
from tests import real_parts
from tests.daemon import CHAT, running_daemon, settings_of, started_daemon, wait_until
from tests.test_pool import Bench, answer_of, bench_in

NO_MEMORY = "E ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


# --- when to come back


@pytest.mark.parametrize("was_loaded", [True, False])
def test_who_finds_all_busy_is_told_to_come_back_after_a_load_of_its_own_model(
    tmp_path: Path, was_loaded: bool
) -> None:
    with bench_in(tmp_path, max_sidecars=1) as bench:
        bench.spec("cold", load_seconds=0.4)
        loaded = bench.use("cold") if was_loaded else None
        with bench.lease("held"), pytest.raises(PoolBusy) as caught:
            bench.lease("cold", 0.1)
        if loaded:
            assert caught.value.retry_after_s == loaded.load_s
            assert f"it took {loaded.load_s:.1f} s to load" in caught.value.message
        else:
            assert caught.value.retry_after_s == pool.LOAD_GUESS_S
            assert "not been loaded yet" in caught.value.message


def test_the_middle_of_the_last_loads_is_what_counts(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=1) as bench:
        history = bench.pool._history_locked(bench.spec("cold").hash)
        history.loads_s.extend([900.0, 1.0, 2.0, 3.0, 4.0, 100.0])
        with (
            bench.lease("held"),
            pytest.raises(PoolBusy, match=r"it took 3\.0 s to load") as caught,
        ):
            bench.lease("cold", 0.1)
        assert caught.value.retry_after_s == 3.0


def test_who_gives_up_on_a_load_is_told_when_it_should_be_done(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        history = bench.pool._history_locked(bench.spec("slow", load_gate=True).hash)
        history.loads_s.extend([30.0])
        with pytest.raises(LoadTimeout, match=r"it took 30\.0 s to load") as caught:
            bench.lease("slow", 1.0)
        assert 20 < (caught.value.retry_after_s or 0) < 29.5
        bench.touch("slow", "load_gate")


# --- silence in the middle of an answer


def stream_of(lease: Lease, **fake: object) -> tuple[http.client.HTTPConnection, object]:
    """A stream from the child itself, of which the first event has come."""
    connection = http.client.HTTPConnection("127.0.0.1", lease.upstream.port, timeout=30)
    headers = {"Authorization": f"Bearer {lease.upstream.api_key}"}
    connection.request("POST", CHAT, json.dumps({"stream": True, "fake": fake}), headers)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return connection, response


def slots_asked(bench: Bench, name: str) -> int:
    rows = bench.lines(name, "events")
    return sum(row["event"] == "done" and row["target"] == "/slots" for row in rows)


def test_a_child_whose_answer_and_slots_stand_still_is_restarted(tmp_path: Path) -> None:
    with bench_in(tmp_path, stall_s=0.8, health_interval_s=0.1) as bench:
        with bench.lease("m") as lease:
            connection, response = stream_of(lease, hang_mid_stream=1)
            assert isinstance(response, http.client.HTTPResponse)
            with contextlib.closing(connection), response:
                wait_until(lambda: lease.sidecar.state is State.GONE, "it is ended")
        assert lease.sidecar.error is not None
        assert "nothing has moved" in lease.sidecar.error.message
        wait_until(lambda: len(bench.lines("m", "starts")) == 2, "another is started unasked")


def test_a_child_whose_slots_move_is_left_alone(tmp_path: Path) -> None:
    with bench_in(tmp_path, stall_s=0.4, health_interval_s=0.05) as bench:
        bench.spec("m", slots_move=True)
        with bench.lease("m") as lease:
            connection, _ = stream_of(lease, hang_mid_stream=1)
            with contextlib.closing(connection):
                begun = time.monotonic()
                wait_until(
                    lambda: time.monotonic() - begun > 4 * 0.4 and slots_asked(bench, "m") > 4,
                    "it could have been ended four times",
                )
                assert lease.sidecar.state is State.READY


def test_an_idle_child_whose_counters_stand_still_is_left_alone(tmp_path: Path) -> None:
    with bench_in(tmp_path, stall_s=0.2, health_interval_s=0.05) as bench:
        idle = bench.use("m")
        began = time.monotonic()
        wait_until(
            lambda: time.monotonic() - began > 1.0 and slots_asked(bench, "m") > 3,
            "five times the time of a stall, and it was looked at",
        )
        assert idle.state is State.READY


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        (b'[{"id":0,"echo":{"id":7},"is_processing":true}]', "[[null, null, null, null, null]]"),
        (b'[{"id_task":5,"next_token":[{"n_decoded":3}]}]', '"n_decoded": 3'),
        (b'[{"n_prompt_tokens_processed":512}]', "512"),
        (b"[]", "[]"),
        (b"{", ""),
        (b"[7]", ""),
        (b'"text"', ""),
        (b"[" * 100_000, ""),
    ],
)
def test_only_the_counters_of_slots_are_compared(slots: bytes, text: str) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(slots)))
            self.end_headers()
            self.wfile.write(slots)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = winsvc.start_thread("slots", server.handle_request)
        found = pool._slots(pool.Upstream(server.server_port, "key"))
        thread.join(10)
    assert found == text if not text else text in found


STUCK_ENV = {"LLAMA_SIDECAR_STALL_SECONDS": "1", "HEALTH_INTERVAL_SECONDS": "0.1"}


def test_who_waits_for_a_child_that_hangs_is_told(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {}}, **STUCK_ENV) as daemon:
        status, _, body = daemon.chat("m", fake={"hang_mid_stream": 1})
        assert (status, body["error"]["code"]) == (502, "upstream_failed")
        assert "nothing has moved" in body["error"]["message"]
        connection, response = daemon.send(
            "POST", CHAT, {"model": "m", "stream": True, "fake": {"hang_mid_stream": 1}}
        )
        with contextlib.closing(connection), response, pytest.raises(http.client.IncompleteRead):
            response.read()
        assert daemon.chat("m")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_trickles_is_left_alone(tmp_path: Path, stream: bool) -> None:
    with running_daemon(tmp_path, {"m": {}}, **STUCK_ENV) as daemon:
        status, _, _ = daemon.chat("m", stream=stream, fake={"chunk_delay": 0.4, "chunks": 8})
        assert status == 200
        assert len(daemon.starts("m")) == 1


@pytest.mark.integration
def test_a_long_prompt_is_not_taken_for_a_stall(tmp_path: Path) -> None:
    stall_s = 2.0
    args = ["-c", "8192", "-b", "32", "-ub", "32", "-t", "1", "--parallel", "1"]
    settings = settings_of(
        real_parts.llama_server_bin(),
        tmp_path,
        {"m": {"path": str(real_parts.smollm2()), "args": args}},
        base_args=[],
        LLAMA_SIDECAR_STALL_SECONDS=f"{stall_s:g}",
        HEALTH_INTERVAL_SECONDS="0.5",
    )
    with started_daemon(settings, tmp_path) as daemon:
        prompt = "one two three four five six seven eight nine ten " * 120
        body = {"model": "m", "prompt": prompt, "max_tokens": 2}
        status, _, answer = daemon.ask("POST", "/v1/completions", body)
        (row,) = daemon.sidecars()
    assert status == 200
    assert answer["timings"]["prompt_ms"] > 1.2 * stall_s * 1000
    assert row["restarts"] == 0


# --- memory


def test_a_load_that_runs_out_of_memory_evicts_one_idle_sidecar_and_tries_again(
    tmp_path: Path,
) -> None:
    with bench_in(tmp_path, max_sidecars=3) as bench:
        bench.use("oldest")
        bench.use("newer")
        bench.spec("big", exit_first_loads=1, exit_on_load={"message": NO_MEMORY})
        with bench.lease("big") as lease:
            assert answer_of(lease) == 200
        assert bench.alive() == {"newer", "big"}
        assert len(bench.lines("big", "starts")) == 2
        wait_until(lambda: bench.pool._held_places == 0, "no place is kept free any more")


def test_who_was_evicted_for_nothing_is_started_again(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=2) as bench:
        bench.use("idle")
        bench.spec("big", exit_on_load={"message": NO_MEMORY})
        with pytest.raises(LoadFailed, match="out of memory"):
            bench.lease("big")
        assert len(bench.lines("big", "starts")) == 2
        wait_until(lambda: len(bench.lines("idle", "starts")) == 2, "it is started again")
        with bench.lease("idle") as lease:
            assert answer_of(lease) == 200
        assert bench.pool._held_places == 0


@pytest.mark.parametrize("kind", ["leased", "pinned"])
def test_nobody_at_work_is_evicted_for_memory(tmp_path: Path, kind: str) -> None:
    with bench_in(tmp_path, max_sidecars=2) as bench:
        bench.spec("big", exit_on_load={"message": NO_MEMORY})
        with contextlib.ExitStack() as stack:
            if kind == "leased":
                stack.enter_context(bench.lease("there"))
            else:
                bench.use("there", pinned=True)
            with pytest.raises(LoadFailed, match="out of memory"):
                bench.lease("big")
            assert len(bench.lines("big", "starts")) == 1
            assert "there" in bench.alive()


def test_another_failure_evicts_nobody(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=2) as bench:
        idle = bench.use("idle")
        bench.spec("broken", exit_on_load={"message": "E no such tensor"})
        with pytest.raises(LoadFailed, match="no such tensor"):
            bench.lease("broken")
        assert len(bench.lines("broken", "starts")) == 1
        assert idle.state is State.READY


def test_the_place_that_was_made_is_not_given_away_before_the_second_try_is_over(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STOP_GRACE_S", 1.5)
    with bench_in(tmp_path, max_sidecars=2) as bench:
        bench.spec("idle", ignore_sigterm=True)
        idle = bench.use("idle")
        bench.spec("big", exit_first_loads=1, exit_on_load={"message": NO_MEMORY}, load_seconds=1.0)
        big = threads.submit(bench.use, "big")
        wait_until(lambda: idle.state is State.STOPPING, "room is being made")
        third = threads.submit(bench.use, "third")
        assert big.result(20).load_s
        assert third.result(20).spec.model_id == "third"
        second_try = bench.lines("big", "starts")[1]["t"]
        (start_of_third,) = (row["t"] for row in bench.lines("third", "starts"))
    assert isinstance(second_try, float)
    assert isinstance(start_of_third, float)
    assert start_of_third - second_try > 0.9


# --- loads that keep failing


def test_the_pause_between_tries_doubles_up_to_a_minute(tmp_path: Path) -> None:
    pauses = []
    with bench_in(tmp_path) as bench:
        spec = bench.spec("m")
        for _ in range(8):
            bench.pool._record_failure(Sidecar(spec, 0, "started", 0, False), LoadFailed("no"))
            history = bench.pool._histories[spec.hash]
            pauses.append(round(history.retry_at - time.monotonic()))
        began = time.monotonic()
        with pytest.raises(LoadFailed, match="no") as caught:
            bench.lease("m")
        assert time.monotonic() - began < 5
        assert 50 < (caught.value.retry_after_s or 0) <= 60
        assert bench.lines("m", "starts") == []
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_when_the_pause_is_over_one_try_serves_all_who_ask(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path) as bench:
        spec = bench.spec("m", load_gate=True, exit_first_loads=1)
        first = threads.submit(bench.use, "m")
        bench.touch("m", "load_gate")
        with pytest.raises(LoadFailed):
            first.result(20)
        wait_until(lambda: not bench.alive(), "its place is free")
        bench.pool._histories[spec.hash].retry_at = 0.0
        served = list(threads.map(lambda _: bench.use("m"), range(6)))
        assert len({id(sidecar) for sidecar in served}) == 1
        assert len(bench.lines("m", "starts")) == 2
        assert bench.pool._histories[spec.hash].failures == 0


def test_a_load_that_finds_no_descriptor_is_told_as_too_many_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        raise OSError(errno.EMFILE, "Too many open files")

    with bench_in(tmp_path) as bench:
        with monkeypatch.context() as patched:
            patched.setattr(winsvc, "spawn", spawn)
            with pytest.raises(OutOfDescriptors) as caught:
                bench.use("m")
        assert (caught.value.status, caught.value.code) == (503, "too_many_connections")
        assert caught.value.retry_after_s
        bench.pool._histories[bench.spec("m").hash].retry_at = 0.0
        wait_until(lambda: not bench.alive(), "its place is free")
        assert bench.use("m").state is State.READY


# --- somebody else's port


class Stranger(http.server.BaseHTTPRequestHandler):
    """Says yes to everything, and remembers what it was asked."""

    heard: list[str]

    def do_GET(self) -> None:
        self.heard.append(f"{self.command} {self.path}\n{self.headers}")
        length = int(self.headers.get("Content-Length") or 0)
        self.heard.append(self.rfile.read(length).decode())
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_stranger_that_takes_the_port_meanwhile_never_sees_a_prompt_or_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers: list[http.server.ThreadingHTTPServer] = []
    heard: list[str] = []
    handler = type("Listening", (Stranger,), {"heard": heard})
    spawn = winsvc.spawn

    def spawn_behind_a_stranger(
        argv: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        if not strangers:
            port = int(argv[argv.index("--port") + 1])
            strangers.append(http.server.ThreadingHTTPServer(("127.0.0.1", port), handler))
            winsvc.start_thread("stranger", strangers[0].serve_forever)
        return spawn(argv, environment)

    monkeypatch.setattr(winsvc, "spawn", spawn_behind_a_stranger)
    try:
        with bench_in(tmp_path) as bench:
            bench.spec("m", load_silent=True, load_seconds=pool.STRANGER_S + 1)
            with bench.lease("m", 30) as lease:
                assert answer_of(lease) == 200
                assert lease.upstream.port != strangers[0].server_port
            first, second = bench.lines("m", "starts")
            assert first["port"] == strangers[0].server_port
            assert second["port"] == lease.upstream.port
            ends = [row for row in bench.lines("m", "events") if row["event"] == "exit"]
            assert ends == []  # the first was taken from the port before it tried to bind
    finally:
        for stranger in strangers:
            stranger.shutdown()
            stranger.server_close()
    said = "\n".join(heard)
    assert "GET /health" in said
    assert "POST" not in said
    assert lease.upstream.api_key not in said
