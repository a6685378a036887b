"""How the daemon ends, whatever it is doing: in time, with code 0, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pool
from tests.daemon import CHAT, SIGKILL, Daemon, is_alive, running_daemon, wait_until

MOMENT_S = 8.0  # for two busy cores to notice and to clean up
DRAIN_S = 1.0
SHORT_DRAIN = {"LLAMA_SIDECAR_DRAIN_SECONDS": str(DRAIN_S)}
WAITING = 32

Answer = tuple[int, dict[str, str], Any]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(WAITING + 4) as executor:
        yield executor


@contextlib.contextmanager
def ends_in_time(
    daemon: Daemon, limit_s: float, signum: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    """Signal the daemon; behind the block it must have ended well, `limit_s` after the signal."""
    begun = time.monotonic()
    daemon.send_signal(signum)
    yield
    assert daemon.process.wait(limit_s + MOMENT_S) == 0
    took_s = time.monotonic() - begun
    assert took_s < limit_s + MOMENT_S
    files = daemon.folder.glob("*.json")
    pids = [start["pid"] for file in files for start in daemon.starts(file.stem)]
    assert [pid for pid in pids if is_alive(pid)] == []
    assert list((daemon.folder / "state").glob("*")) == []


def begin_stream(
    daemon: Daemon, model: str
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream of which the first event has come."""
    connection, response = daemon.send(
        "POST", CHAT, {"model": model, "stream": True, "messages": []}
    )
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    return connection, response


def must_be_told_to_come_back(answer: Answer) -> None:
    status, named, body = answer
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    assert int(named["retry-after"]) >= 1


def waiting_in(daemon: Daemon) -> int:
    return int(daemon.ask("GET", "/health")[2]["queue"]["waiting"])


def is_draining(daemon: Daemon) -> bool:
    return bool(daemon.ask("GET", "/health")[0] == 503)


@pytest.mark.parametrize("used", [[], ["m"]], ids=["without a child", "with one"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends_at_once(
    tmp_path: Path, signum: signal.Signals, used: list[str]
) -> None:
    with running_daemon(tmp_path, {"m": {}}) as daemon, daemon.connect() as idle:
        assert [daemon.chat(model)[0] for model in used] == [200] * len(used)
        with ends_in_time(daemon, 0, signum):
            assert idle.recv(1) == b""


def test_who_waits_for_a_load_is_told_to_come_back(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon:
        waiting = threads.submit(daemon.chat, "m")
        wait_until(lambda: daemon.starts("m"), "the load began")
        with ends_in_time(daemon, 0):
            must_be_told_to_come_back(waiting.result(20))


def test_running_requests_are_finished_and_no_new_ones_taken(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {"stream_gate": 2}, "cold": {}}) as daemon:
        connection, response = begin_stream(daemon, "m")
        with contextlib.closing(connection), response, ends_in_time(daemon, 30):
            wait_until(lambda: is_draining(daemon), "it drains")
            assert daemon.ask("GET", "/health")[2]["status"] == "draining"
            for model in ("m", "cold"):
                must_be_told_to_come_back(daemon.chat(model))
            daemon.open_gate("m", "stream_gate")
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert daemon.starts("cold") == []


def test_what_runs_longer_than_the_drain_is_cut_and_told_so(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    models: Mapping[str, Mapping[str, object]] = {
        "stream": {"stream_gate": 2},
        "whole": {"answer_gate": True},
    }
    with running_daemon(tmp_path, models, **SHORT_DRAIN) as daemon:
        whole = threads.submit(daemon.chat, "whole")
        wait_until(lambda: any(row["in_flight"] for row in daemon.sidecars()), "it is asked")
        connection, response = begin_stream(daemon, "stream")
        with contextlib.closing(connection), response:
            begun = time.monotonic()
            with ends_in_time(daemon, DRAIN_S):
                with pytest.raises(http.client.IncompleteRead):
                    response.read()
                assert time.monotonic() - begun > DRAIN_S / 2
                status, _, body = whole.result(20)
                assert (status, body["error"]["code"]) == (502, "upstream_failed")
                assert "shutdown" in body["error"]["message"]


def test_a_full_queue_is_told_to_come_back(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    settings = {"MAX_SIDECARS": "1", "LLAMA_SIDECAR_QUEUE_SIZE": str(WAITING)}
    models: Mapping[str, Mapping[str, object]] = {"held": {"stream_gate": 2}, "cold": {}}
    with running_daemon(tmp_path, models, **settings) as daemon:
        connection, response = begin_stream(daemon, "held")
        with contextlib.closing(connection), response:
            waiting = queue_up(daemon, threads)
            with ends_in_time(daemon, 30):
                for future in waiting:
                    must_be_told_to_come_back(future.result(20))
                daemon.open_gate("held", "stream_gate")
                assert response.read().endswith(b"data: [DONE]\n\n")
        assert daemon.starts("cold") == []


def test_many_who_wait_for_a_load_are_all_told_before_the_end(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with running_daemon(tmp_path, {"cold": {"load_gate": True}}) as daemon:
        waiting = queue_up(daemon, threads)
        with ends_in_time(daemon, 0):
            for future in waiting:
                must_be_told_to_come_back(future.result(20))


def queue_up(daemon: Daemon, threads: ThreadPoolExecutor) -> list[Future[Answer]]:
    futures: list[Future[Answer]] = [threads.submit(daemon.chat, "cold") for _ in range(WAITING)]
    wait_until(lambda: waiting_in(daemon) == WAITING, "all of them wait")
    return futures


@pytest.mark.parametrize("more", [{}, {"load_gate": True}], ids=["ready", "loading"])
def test_a_child_that_ignores_terminate_is_killed_after_the_grace_time(
    tmp_path: Path, threads: ThreadPoolExecutor, more: dict[str, object]
) -> None:
    with running_daemon(tmp_path, {"m": {"ignore_sigterm": True, **more}}) as daemon:
        asked = threads.submit(daemon.chat, "m")
        if not more:
            assert asked.result(20)[0] == 200
        wait_until(lambda: "load_model: loading" in daemon.log, "it is deaf by now")
        begun = time.monotonic()
        with ends_in_time(daemon, pool.STOP_GRACE_S):
            if more:
                must_be_told_to_come_back(asked.result(20))
        assert time.monotonic() - begun > pool.STOP_GRACE_S - 0.5


def test_a_stop_under_way_is_waited_for(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with running_daemon(tmp_path, {"m": {"ignore_sigterm": True}}) as daemon:
        hash_ = daemon.chat("m")[1]["x-sidecar-hash"]
        deleted = threads.submit(daemon.ask, "DELETE", f"/sidecars/{hash_}")
        wait_until(lambda: daemon.sidecars()[0]["state"] == "stopping", "it is being stopped")
        with ends_in_time(daemon, pool.STOP_GRACE_S):
            assert deleted.result(20)[0] == 200


def test_a_client_that_does_not_read_does_not_hold_the_daemon(tmp_path: Path) -> None:
    switches = {"chunks": 1000, "chunk_bytes": 1 << 18}
    with running_daemon(tmp_path, {"m": switches}, **SHORT_DRAIN) as daemon:
        connection, response = begin_stream(daemon, "m")
        with contextlib.closing(connection), response, ends_in_time(daemon, DRAIN_S):
            pass
        assert CHAT not in [event["target"] for event in daemon.events("m", "done")]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_daemon_without_the_drain(
    tmp_path: Path, second: signal.Signals
) -> None:
    with running_daemon(tmp_path, {"m": {"stream_gate": 2}}) as daemon:
        connection, response = begin_stream(daemon, "m")
        with contextlib.closing(connection), response:
            daemon.send_signal(signal.SIGTERM)
            wait_until(lambda: is_draining(daemon), "it drains")
            with ends_in_time(daemon, 0, second), pytest.raises(http.client.IncompleteRead):
                response.read()


def test_a_third_signal_changes_nothing(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {"ignore_sigterm": True}}) as daemon:
        assert daemon.chat("m")[0] == 200
        for _ in range(2):
            daemon.send_signal(signal.SIGTERM)
            wait_until(lambda: is_draining(daemon), "it drains")
        with ends_in_time(daemon, pool.STOP_GRACE_S):
            pass


def test_children_end_with_a_daemon_that_is_killed(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    models: Mapping[str, Mapping[str, object]] = {
        "a": {},
        "stubborn": {"ignore_sigterm": True},
        "loading": {"load_gate": True},
    }
    with running_daemon(tmp_path, models, MAX_SIDECARS="3") as daemon:
        assert [daemon.chat(name)[0] for name in ("a", "stubborn")] == [200, 200]
        left = threads.submit(daemon.chat, "loading")
        wait_until(lambda: daemon.starts("loading"), "a load began")
        pids = [daemon.starts(name)[0]["pid"] for name in models]
        assert all(map(is_alive, pids))
        daemon.stop(SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), "every child is gone", 2)
        assert isinstance(left.exception(5), http.client.HTTPException | OSError)
