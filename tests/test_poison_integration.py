"""Requests that kill or wedge the real llama-server, through the daemon.

What dies and what wedges is a matter of the build (here b10068); what the
daemon makes of it is not. No request is refused for what its grammar says.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pool
from tests import real_parts
from tests.daemon import CHAT, SIGKILL, Daemon, is_alive, settings_of, started_daemon, wait_until

pytestmark = pytest.mark.integration

MOMENT_S = 5.0  # for two busy cores
STALL_S = 3.0
DRAIN_S = 1.0
LONG = 8000  # tokens: more than SmolLM2 makes in a minute


def pattern(text: str) -> dict[str, Any]:
    """What makes llama-server turn this regular expression into a grammar."""
    schema = {"type": "string", "pattern": text}
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    }


CHAIN = 200_000
KILLERS: Mapping[str, dict[str, Any]] = {
    "nested groups": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "a chain of rules": {
        "grammar": "root ::= r0\n"
        + "".join(f"r{n} ::= r{n + 1}\n" for n in range(CHAIN))
        + f'r{CHAIN} ::= "a"'
    },
    "a pattern that begins with plus": pattern("^+[a-z]$"),
    "a pattern that begins with a count": pattern("^{2}x$"),
    "a repeated lookbehind": pattern("^(?<=x)*a$"),
    "open brackets": pattern("^" + "(" * 100_000 + "$"),
}
WEDGE = pattern("^(((a{0,999}){0,999}){0,999}){0,999}$")


@contextlib.contextmanager
def real_daemon(folder: Path, **env: str) -> Iterator[Daemon]:
    """The daemon over the real llama-server; whatever it started is gone afterwards."""
    settings = settings_of(
        real_parts.llama_server_bin(),
        folder,
        {"poisoned": str(real_parts.tiny()), "other": str(real_parts.smollm2())},
        base_args=["-c", "8192", "-t", "1", "--parallel", "2"],
        HEALTH_INTERVAL_SECONDS="1",
        LLAMA_SIDECAR_STALL_SECONDS=str(STALL_S),
        LLAMA_SIDECAR_DRAIN_SECONDS=str(DRAIN_S),
    )
    pids: set[int] = set()
    with started_daemon(settings | env, folder) as daemon:
        try:
            yield daemon
        finally:
            if daemon.process.poll() is None:
                pids |= {row["pid"] for row in daemon.sidecars() if row["pid"]}
            end(pids)


def end(pids: set[int]) -> None:
    """A wedged one takes a core for itself until it is killed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with real_daemon(tmp_path_factory.mktemp("poison")) as started:
        yield started


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


class OtherStream:
    """A stream of the other model, which must go on whatever happens to the first."""

    def __init__(self, daemon: Daemon) -> None:
        body = {"model": "other", "messages": [{"role": "user", "content": "Tell me a story."}]}
        fields = {"stream": True, "max_tokens": LONG, "ignore_eos": True}
        self._connection, self._response = daemon.send("POST", CHAT, body | fields)
        self.must_move()

    def must_move(self) -> None:
        for _ in range(4):
            line = self._response.readline()
            assert line == b"\n" or line.startswith(b"data: {"), line

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def pid_of(daemon: Daemon, model: str) -> int:
    """Who answers a harmless request."""
    status, headers, _ = daemon.chat(model, max_tokens=2)
    assert status == 200
    (row,) = [row for row in daemon.sidecars() if row["hash"] == headers["x-sidecar-hash"]]
    return int(row["pid"])


def hash_of(daemon: Daemon, model: str) -> str:
    (row,) = [row for row in daemon.sidecars() if row["model_id"] == model]
    return str(row["hash"])


def wedged(daemon: Daemon, threads: ThreadPoolExecutor) -> tuple[int, Any]:
    """The process that is at it for ever, and the future of the request that did it."""
    pid = pid_of(daemon, "poisoned")
    asked = threads.submit(daemon.chat, "poisoned", max_tokens=8, **WEDGE)
    wait_until(lambda: in_flight(daemon, "poisoned") == 1, "the request has come")
    before_s = cpu_s(pid)
    wait_until(lambda: cpu_s(pid) > before_s + 0.5, "it is busy")
    return pid, asked


def in_flight(daemon: Daemon, model: str) -> int:
    return sum(row["in_flight"] for row in daemon.sidecars() if row["model_id"] == model)


def cpu_s(pid: int) -> float:
    """Of all its threads, user and system. proc_pid_stat(5)"""
    if sys.platform == "win32":
        raise OSError("there is no /proc")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("poison", KILLERS.values(), ids=KILLERS)
def test_who_kills_the_process_is_told_how_it_died_and_the_next_one_is_served(
    daemon: Daemon, poison: dict[str, Any], stream: bool
) -> None:
    before = pid_of(daemon, "poisoned")
    with contextlib.closing(OtherStream(daemon)) as other:
        status, _, body = daemon.chat("poisoned", max_tokens=8, stream=stream, **poison)
        assert (status, body["error"]["code"]) == (502, "upstream_failed")
        assert "killed by signal 11" in body["error"]["message"]
        assert not is_alive(before)
        assert pid_of(daemon, "poisoned") != before
        other.must_move()
    wait_until(lambda: in_flight(daemon, "poisoned") == 0, "the lease is released")


def test_a_wedged_process_is_found_and_replaced_while_others_go_on(
    daemon: Daemon, threads: ThreadPoolExecutor
) -> None:
    with contextlib.closing(OtherStream(daemon)) as other:
        pid, asked = wedged(daemon, threads)
        assert daemon.ask("GET", "/health")[0] == 200
        other.must_move()
        status, _, body = asked.result(60)
        assert (status, body["error"]["code"]) == (502, "upstream_failed")
        assert "nothing has moved for" in body["error"]["message"]
        wait_until(lambda: not is_alive(pid), "it is killed, for it ignores terminate")
        assert pid_of(daemon, "poisoned") != pid
        other.must_move()


def test_a_process_wedged_by_a_client_that_left_is_found_while_it_is_idle(
    daemon: Daemon, threads: ThreadPoolExecutor
) -> None:
    pid = pid_of(daemon, "poisoned")
    body = json.dumps({"model": "poisoned", "messages": [], **WEDGE}).encode()
    with daemon.connect() as sock:
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
        )
        before_s = cpu_s(pid)
        wait_until(lambda: cpu_s(pid) > before_s + 0.5, "it is busy")
    wait_until(lambda: in_flight(daemon, "poisoned") == 0, "the client is forgotten")
    wait_until(lambda: not is_alive(pid), "it is killed, for it ignores terminate", 60)
    assert pid_of(daemon, "poisoned") != pid


def test_a_wedged_process_can_be_deleted(daemon: Daemon, threads: ThreadPoolExecutor) -> None:
    with contextlib.closing(OtherStream(daemon)) as other:
        pid, asked = wedged(daemon, threads)
        begun = time.monotonic()
        assert daemon.ask("DELETE", f"/sidecars/{hash_of(daemon, 'poisoned')}")[0] == 200
        assert not is_alive(pid)
        assert time.monotonic() - begun < pool.STOP_GRACE_S + MOMENT_S
        status, _, body = asked.result(10)
        assert (status, body["error"]["code"]) == (502, "upstream_failed")
        other.must_move()
    assert pid_of(daemon, "poisoned") != pid


def test_a_wedged_process_does_not_hold_the_end_of_the_daemon(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with real_daemon(tmp_path, LLAMA_SIDECAR_STALL_SECONDS="300") as daemon:
        pid, asked = wedged(daemon, threads)
        try:
            begun = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - begun < DRAIN_S + pool.STOP_GRACE_S + MOMENT_S
            assert not is_alive(pid)
            assert asked.result(10)[0] == 502
        finally:
            end({pid})
