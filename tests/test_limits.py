"""What the daemon bounds: connections, time, memory, descriptors, queues, tails."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import select
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import llama_sidecar
import pool
import winsvc
from pool import Pool
from tests.daemon import CHAT, FAKE_SERVER, Daemon, running_daemon, settings_of, wait_until
from tests.test_pool import bench_in

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
POST = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
DESCRIPTORS = 64


@pytest.fixture(autouse=True)
def many_descriptors() -> None:
    """This process holds the other end of each connection."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer with a Content-Length."""
    response = http.client.HTTPResponse(sock)
    with response:
        response.begin()
        return response.status, response.read()


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


# --- connections


def test_a_thousand_idle_connections_do_not_stop_a_request(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {}}) as daemon, contextlib.ExitStack() as stack:
        assert daemon.chat("m")[0] == 200
        for _ in range(1000):
            stack.enter_context(daemon.connect())
        assert daemon.chat("m")[0] == 200
        assert daemon.ask("GET", "/health")[0] == 200


def test_one_connection_more_than_the_limit_is_told_so(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {}}) as daemon, contextlib.ExitStack() as stack:
        held = [stack.enter_context(daemon.connect()) for _ in range(1024)]
        for sock in held:
            sock.sendall(HEALTH)
        assert [read_answer(sock)[0] for sock in held] == [200] * 1024
        for _ in range(3):
            with daemon.connect() as refused:
                status, body = read_answer(refused)
                assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
        held[0].sendall(HEALTH)
        assert read_answer(held[0])[0] == 200
        held.pop().close()
        wait_until(lambda: is_served(daemon), "the place of one that left is free")


def is_served(daemon: Daemon) -> bool:
    """False also where the refusal was lost: it is sent before the request is read."""
    try:
        return bool(daemon.ask("GET", "/health")[0] == 200)
    except (OSError, http.client.HTTPException):
        return False


# --- descriptors


def test_a_flood_of_connections_with_few_descriptors_is_survived(tmp_path: Path) -> None:
    wrapper = ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh"]
    settings = {"HEALTH_INTERVAL_SECONDS": "0.1"}
    models: dict[str, dict[str, object]] = {"m": {}, "cold": {}}
    with (
        running_daemon(tmp_path, models, wrapper=wrapper, **settings) as daemon,
        daemon.connect() as early,
    ):
        assert daemon.chat("m")[0] == 200
        flooded_at = uptime_s(early)
        with contextlib.ExitStack() as flood:
            for _ in range(4 * DESCRIPTORS):
                flood.enter_context(daemon.connect()).sendall(HEALTH)
            wait_until(lambda: descriptors_of(daemon) >= DESCRIPTORS - 1, "it has no more of them")
            body = b'{"model":"cold"}'
            early.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            status, told = read_answer(early)
            assert (status, json.loads(told)["error"]["code"]) == (503, "too_many_connections"), (
                told
            )
            wait_until(lambda: uptime_s(early) > flooded_at + 1.5, "many probes were due")
        assert daemon.chat("m")[1]["x-sidecar-start"] == "reused"
        wait_until(lambda: daemon.chat("cold")[0] == 200, "a cold one is started after all")
        assert len(daemon.starts("m")) == 1


def test_a_start_for_which_descriptors_are_too_few_is_told_so_however_far_it_came(
    tmp_path: Path,
) -> None:
    """With one more of them free each time, until all that a start takes are there."""
    wrapper = ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh"]
    models = {f"cold{number}": dict[str, object]() for number in range(20)}
    seen = []
    with (
        running_daemon(tmp_path, models, wrapper=wrapper) as daemon,
        daemon.connect() as early,
        contextlib.ExitStack() as flood,
    ):
        uptime_s(early)
        held = [flood.enter_context(daemon.connect()) for _ in range(DESCRIPTORS)]
        wait_until(lambda: descriptors_of(daemon) >= DESCRIPTORS - 1, "it has no more of them")
        for model in models:
            body = b'{"model":"%b"}' % model.encode()
            early.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            while not select.select([early], [], [], 0.5)[0]:
                held.pop(0).close()  # it is started, and waits for what asking it takes
            status, told = read_answer(early)
            if status == 200:
                break
            seen.append((status, json.loads(told)["error"]["code"]))
            held.pop(0).close()
        else:
            pytest.fail(f"none was started: {seen}")
    assert set(seen) == {(503, "too_many_connections")}


def test_a_request_to_a_running_process_is_told_so_too(tmp_path: Path) -> None:
    """Its only kept connection is held by a stream, and there is nothing for another."""
    wrapper = ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh"]
    stream = {"model": "m", "stream": True, "fake": {"stream_gate": 1}}
    with (
        running_daemon(tmp_path, {"m": {}}, wrapper=wrapper) as daemon,
        daemon.connect() as early,
        contextlib.ExitStack() as flood,
    ):
        uptime_s(early)
        connection, response = daemon.send("POST", CHAT, stream)
        flood.callback(connection.close)
        assert response.readline().startswith(b"data: ")
        for _ in range(DESCRIPTORS):
            flood.enter_context(daemon.connect())
        wait_until(lambda: descriptors_of(daemon) >= DESCRIPTORS, "it has no more of them")
        body = b'{"model":"m"}'
        early.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        status, told = read_answer(early)
        assert (status, json.loads(told)["error"]["code"]) == (503, "too_many_connections")
        daemon.open_gate("m", "stream_gate")
        assert response.read().rstrip().endswith(b"[DONE]")
        assert len(daemon.starts("m")) == 1


def uptime_s(sock: socket.socket) -> float:
    sock.sendall(HEALTH)
    return float(json.loads(read_answer(sock)[1])["uptime_seconds"])


def descriptors_of(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


# --- a reader slower than the model

MEGABYTE = 1 << 20
CHUNKS = 160
CHUNK_BYTES = MEGABYTE // 2


def test_a_slow_reader_holds_only_its_own_stream_and_no_memory(tmp_path: Path) -> None:
    switches = {"chunks": CHUNKS, "chunk_bytes": CHUNK_BYTES, "no_events": True}
    with running_daemon(tmp_path, {"m": switches}) as daemon:
        body = {"model": "m", "stream": True, "messages": []}
        assert daemon.chat("m", fake={"chunks": 1})[0] == 200
        before = resident_bytes(daemon.process.pid)
        connection, response = daemon.send("POST", CHAT, body)
        with contextlib.closing(connection), response:
            first = response.readline()
            whole = daemon.chat("m", stream=True)[2]
            assert whole.endswith(b"data: [DONE]\n\n")
            assert len(whole) > CHUNKS * CHUNK_BYTES
            wait_until(lambda: [r["in_flight"] for r in daemon.sidecars()] == [1], "one is left")
            assert resident_bytes(daemon.process.pid) - before < 16 * MEGABYTE
            rest = response.read()
        assert len(first + rest) == len(whole)


# --- clients that take their time


@contextlib.contextmanager
def served_here(folder: Path) -> Iterator[int]:
    """The daemon's server in this process, on this port: its times can be made short."""
    model = folder / "m.json"
    model.write_text("{}")
    config = llama_sidecar.read_config(
        settings_of(
            FAKE_SERVER,
            folder,
            {"m": model.name},
            base_args=[],
            LLAMA_SIDECAR_STATE_DIR=str(folder / "state"),
        )
    )
    catalog = llama_sidecar.LiveCatalog(config)
    running = Pool(llama_sidecar._pool_config(config, catalog, folder))
    server = llama_sidecar.Server(config, catalog, running)
    serving = winsvc.start_thread("http", server.serve_forever, 0.05)
    try:
        yield int(server.server_address[1])
    finally:
        running.close(0)
        server.shutdown()
        server.server_close()
        serving.join()


def test_connections_one_after_another_share_a_few_threads(tmp_path: Path) -> None:
    before, served_by = set(threading.enumerate()), set()
    with served_here(tmp_path) as port:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(HEALTH)
                assert read_answer(sock)[0] == 200
                served_by |= {t for t in threading.enumerate() if t.name == "http-client"}
    assert 1 <= len(served_by - before) < 25


def trickle(sock: socket.socket, data: bytes) -> bytes:
    """Send byte by byte until the server has had enough; what it would not wait for."""
    for sent, byte in enumerate(data):
        with contextlib.suppress(OSError):
            sock.sendall(bytes([byte]))
        if winsvc.wait_readable([sock], 0.02):
            return data[sent:]
    return b""


SHORT_S = 0.4
SIZED = POST + b"Content-Length: 2000\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = {
    "a head that stops": (POST, b""),
    "a head byte by byte": (POST, b"X-Pad: " + b"x" * 1000),
    "a body that stops": (SIZED + b'{"model": ', b""),
    "a body byte by byte": (SIZED, b" " * 1000),
    "a chunked body that stops": (CHUNKED + b"8\r\n{", b""),
    "a chunked body byte by byte": (CHUNKED, b"1\r\n \r\n" * 300),
}


@pytest.mark.parametrize(("at_once", "slowly"), SLOW.values(), ids=SLOW)
def test_who_is_slow_to_ask_is_told_408_and_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bytes, slowly: bytes
) -> None:
    monkeypatch.setattr(llama_sidecar, "HEAD_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(llama_sidecar, "BODY_SILENCE_S", SHORT_S)
    with served_here(tmp_path) as port, socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(at_once)
        assert bool(trickle(sock, slowly)) == bool(slowly)
        status, body = read_answer(sock)
        assert (status, json.loads(body)["error"]["code"]) == (408, "bad_request")
        assert sock.recv(1) == b""


@pytest.mark.parametrize("head", [SIZED, CHUNKED], ids=["sized", "chunked"])
def test_a_body_that_takes_long_but_keeps_up_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(llama_sidecar, "BODY_SILENCE_S", SHORT_S)
    monkeypatch.setattr(llama_sidecar, "MIN_BODY_BYTES_PER_S", 1.0)
    text = b'{"model": "m"}' + b" " * 1986
    pieces = [text[start : start + 40] for start in range(0, len(text), 40)]
    with served_here(tmp_path) as port, socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(head)
        for piece in pieces:
            framed = b"%x\r\n%b\r\n" % (len(piece), piece) if head == CHUNKED else piece
            sock.sendall(framed)
            assert not winsvc.wait_readable([sock], 2 * SHORT_S / len(pieces))
        if head == CHUNKED:
            sock.sendall(b"0\r\n\r\n")
        assert read_answer(sock)[0] == 200


def test_an_idle_connection_is_closed_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_sidecar, "IDLE_TIMEOUT_S", SHORT_S)
    with served_here(tmp_path) as port:
        address = ("127.0.0.1", port)
        with (
            socket.create_connection(address, 20) as silent,
            socket.create_connection(address, 20) as used,
        ):
            used.sendall(HEALTH)
            assert read_answer(used)[0] == 200
            assert (silent.recv(1), used.recv(1)) == (b"", b"")


# --- what is kept of a child and of a spec


def test_the_tail_of_a_childs_output_is_bounded(tmp_path: Path) -> None:
    with bench_in(tmp_path) as bench:
        bench.spec("m", flood_bytes_when_ready=8 * MEGABYTE)
        tail = bench.use("m").tail
        wait_until(lambda: len(tail) == pool.TAIL_LINES, "many lines were read")
        assert tail.maxlen == pool.TAIL_LINES


def test_a_flood_of_output_does_not_flood_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pool")
    with bench_in(tmp_path) as bench:
        bench.spec("m", flood_bytes=8 * MEGABYTE)
        loaded = bench.use("m")
    assert loaded.load_s
    wait_until(lambda: "more lines)" in caplog.text, "it is said that there were more")
    told = [record.getMessage() for record in caplog.records if "flood" in record.getMessage()]
    assert pool.LOGGED_LINES_PER_S <= len(told) <= pool.LOGGED_LINES_PER_S * (loaded.load_s + 2)


def test_a_line_without_end_is_read_in_pieces() -> None:
    program = "import os; [os.write(1, b'x' * 65536) for _ in range(64)]"
    process = winsvc.spawn([sys.executable, "-c", program], {"PATH": os.environ["PATH"]})
    longest, total = 0, 0
    for line in winsvc.output_lines(process, pool.LINE_BYTES):
        longest, total = max(longest, len(line)), total + len(line)
    assert process.wait(10) == 0
    assert (longest, total) == (pool.LINE_BYTES, 64 * 65536)


def test_what_is_remembered_of_specs_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MAX_HISTORIES", 3)
    names = [f"m{number}" for number in range(6)]
    with bench_in(tmp_path) as bench:
        for name in names:
            bench.spec(name, exit_on_load={"code": 1})
            with pytest.raises(pool.LoadFailed):
                bench.lease(name)
        assert len(bench.pool._histories) == 3


def test_the_queue_of_the_daemon_is_bounded(tmp_path: Path) -> None:
    settings = {"MAX_SIDECARS": "1", "LLAMA_SIDECAR_QUEUE_SIZE": "3"}
    models: dict[str, dict[str, object]] = {"held": {"answer_gate": True}, "cold": {}}
    with running_daemon(tmp_path, models, **settings) as daemon, ThreadPoolExecutor(9) as threads:
        held = threads.submit(daemon.chat, "held")
        wait_until(lambda: any(row["in_flight"] for row in daemon.sidecars()), "it is held")
        waiting = [threads.submit(daemon.chat, "cold") for _ in range(8)]
        wait_until(lambda: sum(future.done() for future in waiting) == 5, "five are refused")
        assert daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 3
        daemon.open_gate("held", "answer_gate")
        assert held.result(20)[0] == 200
        assert sorted(future.result(20)[0] for future in waiting) == [200] * 3 + [429] * 5


def test_a_turn_goes_to_who_has_waited_longest() -> None:
    """Also where the one who had it wants it again at once, which threading.Lock would allow."""
    turn, had = llama_sidecar.InTurn(), list[str]()

    def work(name: str) -> None:
        with turn:
            had.append(name)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(20)]
    with turn:
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(partial(has_waiters, turn, number), "it waits")
    work("again")
    for thread in threads:
        thread.join(30)
    assert had == [*map(str, range(20)), "again"]
    work("at last")
    assert had[-1] == "at last"


def has_waiters(turn: llama_sidecar.InTurn, number: int) -> bool:
    return len(turn._waiting) == number


# --- processors


def allowed_cpus(thread: int = 0) -> frozenset[int]:
    """Where this thread may run; 0 is the one that asks."""
    if sys.platform == "win32":
        raise NotImplementedError
    return frozenset(os.sched_getaffinity(thread))


def threads_by_cpus(pid: int) -> Counter[frozenset[int]]:
    """How many of its threads may run where."""
    found: Counter[frozenset[int]] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            found[allowed_cpus(int(task.name))] += 1
    return found


def test_the_daemon_keeps_to_one_processor_and_its_children_have_all(tmp_path: Path) -> None:
    given = allowed_cpus()
    one = frozenset(sorted(given)[:2][-1:])
    with running_daemon(tmp_path, {"a": {}, "b": {}}, MAX_SIDECARS="1") as daemon:
        for model in ("a", "b", "a"):  # the last one is started after an eviction
            assert daemon.chat(model)[0] == 200
            (row,) = daemon.sidecars()
            assert threads_by_cpus(row["pid"]).keys() == {given}
        found = threads_by_cpus(daemon.process.pid)
    assert found.keys() == {one, given}
    assert found[one] > 1
    if one != given:
        assert found[given] == 1, "only the thread that starts the children"


def test_the_daemon_runs_everywhere_if_it_shall(tmp_path: Path) -> None:
    given = allowed_cpus()
    with running_daemon(tmp_path, {"m": {}}, LLAMA_SIDECAR_CPUS="all") as daemon:
        assert daemon.chat("m")[0] == 200
        assert threads_by_cpus(daemon.process.pid).keys() == {given}


def test_of_one_processor_nothing_is_taken_away(tmp_path: Path) -> None:
    only = min(allowed_cpus())
    wrapper = ["taskset", "--cpu-list", str(only)]
    with running_daemon(tmp_path, {"m": {}}, wrapper=wrapper) as daemon:
        assert daemon.chat("m")[0] == 200
        (row,) = daemon.sidecars()
        for pid in (daemon.process.pid, row["pid"]):
            assert threads_by_cpus(pid).keys() == {frozenset({only})}
