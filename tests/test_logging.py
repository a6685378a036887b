"""The log: one line an event, greppable by hash, without secrets and control characters."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_sidecar
from tests.daemon import (
    CHAT,
    FAKE_SERVER,
    ROOT,
    Daemon,
    bare_environment,
    free_port_range,
    own_console,
    running_daemon,
    wait_until,
)

KEY = "correct-horse-battery"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
WHOLE_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) "
    r"(llama-sidecar|pool|winsvc) .+"
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MODELS: dict[str, dict[str, object]] = {
    "plain": {},
    "spoken": {"load_lines": 0.05, "load_gate": True},
    "binary": {"binary_output": True},
    "broken": {"exit_on_load": {"code": 3, "message": "out of memory\x1b[0m"}},
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("logging")
    settings = {"MAX_SIDECARS": "4", "LOG_LEVEL": "debug", "LLAMA_SIDECAR_API_KEY": KEY}
    with running_daemon(folder, MODELS, **settings) as running:
        yield running


def ask(daemon: Daemon, model: str, **fields: object) -> tuple[int, dict[str, str]]:
    body = {"model": model, "messages": [], **fields}
    status, headers, _ = daemon.ask("POST", CHAT, body, AUTHORIZED)
    return status, headers


def line_with(daemon: Daemon, *words: str, since: int = 0) -> str:
    """The one line that holds all these words, once it is there."""
    found = wait_until(
        lambda: [line for line in daemon.lines[since:] if all(word in line for word in words)],
        f"a line with {words}",
    )
    assert len(found) == 1, found
    return found[0]


def test_each_request_is_one_line_with_who_served_it_and_how_long_it_took(daemon: Daemon) -> None:
    hash_ = ask(daemon, "plain")[1]["x-sidecar-hash"]
    since = len(daemon.lines)
    wait_until(lambda: " request hash=" in daemon.log, "the first request is logged")
    ask(daemon, "plain", fake={"prefill_seconds": 0.2})
    line = line_with(daemon, " request ", "start=reused", since=since)
    match = re.search(
        rf"INFO llama-sidecar request hash={hash_} model=plain path={CHAT} status=200 "
        r"start=reused wait_ms=0 ms=(\d+) bytes=(\d+)$",
        line,
    )
    assert match, line
    assert 200 <= int(match[1]) < 20_000
    assert int(match[2]) > 100


def test_a_request_whose_client_left_says_so(daemon: Daemon) -> None:
    ask(daemon, "plain")
    since = len(daemon.lines)
    connection, response = daemon.send(
        "POST",
        CHAT,
        {"model": "plain", "stream": True, "fake": {"hang_mid_stream": 1}},
        AUTHORIZED,
    )
    with contextlib.closing(connection), response:
        response.read1()
    line = line_with(daemon, " request ", "client left", since=since)
    assert "status=200" in line


def test_a_stream_that_broke_says_why(daemon: Daemon) -> None:
    ask(daemon, "plain")
    since = len(daemon.lines)
    fake = {"stream_gate": 1, "bad_chunk": 1}
    body = {"model": "plain", "stream": True, "fake": fake}
    connection, response = daemon.send("POST", CHAT, body, AUTHORIZED)
    with contextlib.closing(connection), response:
        assert b" one" in response.read1()
        daemon.open_gate("plain", "stream_gate")
        assert "a chunk size is malformed" in line_with(daemon, " request ", " cut: ", since=since)


def test_a_start_names_pid_port_and_arguments_and_its_end_the_seconds(daemon: Daemon) -> None:
    since = len(daemon.lines)
    body = {"model": "plain", "messages": []}
    _, headers, _ = daemon.ask("POST", CHAT, body, AUTHORIZED | {"X-Agent-Flags": "-c 5"})
    start, hash_ = daemon.starts("plain")[-1], headers["x-sidecar-hash"]
    who = f"hash={hash_} model=plain pid={start['pid']} port={start['port']}"
    line = line_with(daemon, f"INFO pool start {who}", since=since)
    assert line.endswith("args=['--ctx-size', '5']")
    ready = line_with(daemon, f"INFO pool ready {who}", since=since)
    assert re.search(r"load_s=\d+\.\d{3}$", ready)
    daemon.ask("DELETE", f"/sidecars/{hash_}", None, AUTHORIZED)
    assert line_with(daemon, f"INFO pool stop {who}").endswith("why=it was deleted")


def test_what_a_child_says_carries_its_hash_at_info_only_while_it_loads(daemon: Daemon) -> None:
    with contextlib.closing(daemon.connect()) as connection:
        body = json.dumps({"model": "spoken"}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        (hash_,) = wait_until(
            lambda: re.findall(r"start hash=([0-9a-f]{12}) model=spoken", daemon.log), "a start"
        )
        wait_until(lambda: daemon.log.count(f"INFO pool [{hash_}] ") >= 2, "lines of progress")
        daemon.open_gate("spoken", "load_gate")
        assert connection.recv(12) == b"HTTP/1.1 200"
    wait_until(
        lambda: re.search(rf"DEBUG pool \[{hash_}\] .*processing task", daemon.log),
        "what it says of the request",
    )


def test_a_load_that_fails_is_a_warning_with_the_reason(daemon: Daemon) -> None:
    since = len(daemon.lines)
    assert ask(daemon, "broken")[0] == 502
    line = line_with(daemon, "WARNING pool failed ", "model=broken", since=since)
    assert "exit code 3" in line
    assert "out of memory\\x1b[0m" in line


def test_a_refusal_is_one_line_with_status_and_code(daemon: Daemon) -> None:
    since = len(daemon.lines)
    ask(daemon, "nobody-at-all")
    line = line_with(daemon, "nobody-at-all", since=since)
    assert "INFO llama-sidecar refused status=404 code=model_not_found: " in line


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("crlf\r\nFORGED line", "crlf\\"),
        ("esc\x1b[31mred\x1b]0;title\x07", "esc\\x1b"),
        ("c1\x9b2J\x85next\u2028line", "c1\\x9b"),
        ("nul\x00del\x7f", "nul\\x00"),
        ("half\ud800pair", "half\\"),
    ],
    ids=["crlf", "esc", "c1", "nul", "surrogate"],
)
def test_a_models_name_cannot_write_to_the_log_as_it_likes(
    daemon: Daemon, name: str, written: str
) -> None:
    since = len(daemon.lines)
    assert ask(daemon, name)[0] == 404
    line_with(daemon, "code=model_not_found", written, since=since)
    assert_clean(daemon)


def test_a_childs_binary_output_is_written_out(daemon: Daemon) -> None:
    assert ask(daemon, "binary")[0] == 200
    wait_until(lambda: "\\x1b[31mred" in daemon.log, "its output")
    assert_clean(daemon)


def assert_clean(daemon: Daemon) -> None:
    lines = list(daemon.lines)
    assert [line for line in lines if not WHOLE_LINE.fullmatch(line) or CONTROL.search(line)] == []


def test_no_key_of_anybody_is_in_the_log(daemon: Daemon) -> None:
    ask(daemon, "plain")
    ask(daemon, "plain", fake={"die_before_answer": True})
    wrong = {"Authorization": "Bearer a-wrong-guess", "X-Api-Key": "a-wrong-guess"}
    since = len(daemon.lines)
    assert daemon.ask("POST", CHAT, {"model": "plain"}, wrong)[0] == 401
    line_with(daemon, "status=401", since=since)
    keys = {row["env"]["LLAMA_API_KEY"] for row in daemon.starts("plain")}
    assert keys
    assert all(len(key) >= 20 for key in keys)
    for key in (KEY, "a-wrong-guess", *keys):
        assert key not in daemon.log


LEVELS_SEEN = {
    "debug": {"DEBUG", "INFO", "WARNING"},
    "info": {"INFO", "WARNING"},
    "warn": {"WARNING"},
    "error": set[str](),
}


@pytest.mark.parametrize(("level", "seen"), LEVELS_SEEN.items())
def test_the_level_decides_what_is_written(tmp_path: Path, level: str, seen: set[str]) -> None:
    """A load that fails is a warning, a request that is served is information."""
    with quiet_daemon(tmp_path, level) as daemon:
        assert daemon.chat("plain")[0] == 200
        assert daemon.chat("broken")[0] == 502
        assert daemon.stop() == 0
    levels = {match[1] for line in daemon.lines if (match := WHOLE_LINE.fullmatch(line))}
    assert levels == seen


@contextlib.contextmanager
def quiet_daemon(folder: Path, level: str) -> Iterator[Daemon]:
    """A daemon that may be too quiet to say where it listens, so at a port that is known."""
    for name in ("plain", "broken"):
        (folder / f"{name}.json").write_text(json.dumps(MODELS[name]))
    map_file = folder / "models.map"
    map_file.write_text('{"plain": "plain.json", "broken": "broken.json"}')
    ports = free_port_range()
    first, last = (int(port) for port in ports.split("-"))
    settings = {
        **bare_environment(),
        "LLAMA_SERVER_BIN": str(FAKE_SERVER),
        "MODEL_DIR_MAP_FILE": str(map_file),
        "LLAMA_SIDECAR_BIND": f"127.0.0.1:{first}",
        "PORT_RANGE": f"{first + 1}-{last}",
        "BASE_ARGS": "[]",
        "LOG_LEVEL": level,
    }
    with subprocess.Popen(
        [sys.executable, str(ROOT / "llama_sidecar.py")],
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        **own_console(),
    ) as process:
        daemon = Daemon(process, folder)
        daemon.port = first
        try:
            wait_until(lambda: listens(first), "the daemon listens")
            yield daemon
        finally:
            process.kill()
            process.wait()
            daemon._reader.join(5)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_log_file_that_cannot_be_renamed_goes_on_and_is_rotated_later(tmp_path: Path) -> None:
    file, in_the_way = tmp_path / "log.txt", tmp_path / "log.txt.aside"
    handler = llama_sidecar._LogFile(file, maxBytes=100, backupCount=2, encoding="utf-8")
    with contextlib.closing(handler):
        in_the_way.mkdir()
        for number in range(10):
            handler.emit(logging.makeLogRecord({"msg": f"line {number} " + "." * 50}))
        assert len(file.read_text().splitlines()) == 10
        assert [each.name for each in tmp_path.glob("*.1")] == []
        in_the_way.rmdir()
        handler.retry_at = 0.0
        handler.emit(logging.makeLogRecord({"msg": "after"}))
    assert file.read_text() == "after\n"
    assert len((tmp_path / "log.txt.1").read_text().splitlines()) == 10


@pytest.mark.skipif(sys.platform != "win32", reason="elsewhere an open file can be renamed")
def test_a_log_file_that_another_program_reads_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    handler = llama_sidecar._LogFile(file, maxBytes=100, backupCount=2, encoding="utf-8")
    with contextlib.closing(handler), file.open() as reading:
        for number in range(10):
            handler.emit(logging.makeLogRecord({"msg": f"line {number} " + "." * 50}))
        assert len(reading.read().splitlines()) == 10


def test_nobody_waits_for_the_line_that_another_writes() -> None:
    """While a full pipe keeps the writer, others bring their lines and go on with their work."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as read, os.fdopen(writing, "w") as written:
        lines = llama_sidecar._Lines([logging.StreamHandler(written)])
        lines.setFormatter(llama_sidecar._OneLine())
        blocked = logging.makeLogRecord({"msg": "x" * PIPE_BYTES, "name": "first"})
        writer = threading.Thread(target=lines.handle, args=(blocked,))
        writer.start()
        wait_until(lines._writing.locked, "the first line is being written")
        for number in range(100):
            lines.handle(logging.makeLogRecord({"msg": "line %d", "args": (number,)}))
        assert writer.is_alive()
        assert read.readline().endswith("xxx\n")
        assert [read.readline().split()[-1] for _ in range(100)] == [str(n) for n in range(100)]
        writer.join(30)
        assert not writer.is_alive()


PIPE_BYTES = 1 << 20  # more than any pipe holds


def test_nobody_writes_for_others_for_ever() -> None:
    """While each written line brings another, whoever began with it can go on with its work."""
    writers: list[str] = []

    class Busy(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            writers.append(threading.current_thread().name)
            if len(writers) < 50:
                lines._lines.append("somebody's")

    lines = llama_sidecar._Lines([Busy()])
    lines.setFormatter(llama_sidecar._OneLine())
    lines.handle(logging.makeLogRecord({"msg": "ours"}))
    wait_until(lambda: len(writers) == 50, "all lines are written")
    ours = threading.current_thread().name
    assert writers == [ours] * 4 + ["log"] * 46


def test_a_file_is_looked_at_again_after_a_while_and_each_time_if_it_is_missing(
    tmp_path: Path,
) -> None:
    file, looks = tmp_path / "model.gguf", []

    def look(path: Path) -> bool:
        looks.append(path)
        return path.is_file()

    trusting, doubting = llama_sidecar._Glance(look, 3600.0), llama_sidecar._Glance(look, 0.0)
    assert not trusting.at(file)
    file.touch()
    assert trusting.at(file)
    assert doubting.at(file)
    file.unlink()
    assert trusting.at(file), "an hour has not passed"
    assert len(looks) == 3
    assert not doubting.at(file)
