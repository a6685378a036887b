"""Comments to a streaming client that waits, and what may still go wrong after the first."""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import CHAT, Daemon, read_all, read_until, running_daemon, wait_until

WISH = {"X-Sidecar-Progress": "comments"}
LOADING = re.compile(r": loading model \d+\.\ds")
WAITING = re.compile(r": waiting for a place, \d+ ahead \d+\.\ds")
MESSAGES = "/v1/messages"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def ask(
    daemon: Daemon,
    model: str,
    *,
    path: str = CHAT,
    version: str = "1.1",
    headers: dict[str, str] = WISH,
    fields: Mapping[str, object] | None = None,
) -> socket.socket:
    """A request for a stream, sent on a connection of its own."""
    body = json.dumps(
        {"model": model, "messages": [], "stream": True} | dict(fields or {})
    ).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    sock = daemon.connect()
    sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return sock


def unchunked(body: bytes) -> tuple[bytes, bool]:
    """The chunks' content, and whether a last chunk ended them."""
    content = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return content, True
        content += rest[:length]
        assert rest[length : length + 2] == b"\r\n"
        body = rest[length + 2 :]
    return content, False


def events_of(content: bytes) -> list[str]:
    return content.decode().removesuffix("\n\n").split("\n\n")


def split(answer: bytes) -> tuple[str, list[str], bool]:
    """Head, events and comments, and whether the stream had a proper end."""
    head, _, body = answer.partition(b"\r\n\r\n")
    content, is_ended = unchunked(body)
    return head.decode(), events_of(content), is_ended


def test_while_it_loads_comments_say_so_and_the_childs_events_follow_unchanged(
    tmp_path: Path,
) -> None:
    with running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon:
        with ask(daemon, "m", fields={"max_tokens": 3}) as sock:
            begun = read_until(sock, b"\n\n\r\n")
            begun += read_until(sock, b"\n\n\r\n")
            daemon.open_gate("m", "load_gate")
            head, events, is_ended = split(begun + read_until(sock, b"\r\n0\r\n\r\n"))
        plain = daemon.ask("POST", CHAT, {"model": "m", "stream": True, "max_tokens": 3})[2]
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert "\r\nContent-Type: text/event-stream\r\n" in head
    assert "\r\nTransfer-Encoding: chunked\r\n" in head
    comments = [event for event in events if event.startswith(":")]
    assert len(comments) >= 2
    assert [text for text in comments if not LOADING.fullmatch(text)] == []
    seconds = [float(text.split()[-1][:-1]) for text in comments]
    assert all(later - earlier > 0.8 for earlier, later in itertools.pairwise(seconds))
    assert events[: len(comments)] == comments
    rest = [told(event) for event in events[len(comments) :]]
    assert rest == [told(event) for event in events_of(plain)]
    assert is_ended


def told(event: str) -> object:
    """What an event tells, the answer's own id and time aside."""
    if event == "data: [DONE]":
        return event
    value = json.loads(event.removeprefix("data: "))
    return [value.get("choices"), value.get("object"), value.get("usage")]


def test_while_it_queues_comments_say_how_many_are_ahead(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    models: dict[str, dict[str, object]] = {"held": {"answer_gate": True}, "first": {}, "m": {}}
    with running_daemon(tmp_path, models, MAX_SIDECARS="1") as daemon:
        held = threads.submit(daemon.chat, "held")
        wait_until(lambda: any(row["in_flight"] for row in daemon.sidecars()), "it is held")
        first = threads.submit(daemon.chat, "first")
        wait_until(lambda: daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 1, "one waits")
        with ask(daemon, "m") as sock:
            begun = read_until(sock, b"\n\n\r\n")
            daemon.open_gate("held", "answer_gate")
            _, events, is_ended = split(begun + read_until(sock, b"\r\n0\r\n\r\n"))
        assert (held.result(20)[0], first.result(20)[0]) == (200, 200)
    assert WAITING.fullmatch(events[0])
    assert ", 1 ahead " in events[0]
    assert events[-1] == "data: [DONE]"
    assert is_ended


@pytest.mark.parametrize(
    ("headers", "version", "fields"),
    [
        ({}, "1.1", {}),
        (WISH, "1.0", {}),
        (WISH, "1.1", {"stream": False}),
        (WISH, "1.1", {"stream": None}),
        (WISH, "1.1", {"stream": 1}),
    ],
)
def test_who_cannot_be_told_hears_nothing_before_the_answer(
    tmp_path: Path, headers: dict[str, str], version: str, fields: dict[str, object]
) -> None:
    with running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon:
        both = (
            ask(daemon, "m", headers=headers, version=version, fields=fields),
            ask(daemon, "m"),
        )
        with both[0] as silent, both[1] as talking:
            for _ in range(2):
                read_until(talking, b"\n\n\r\n")  # so long the other one could be told too
            silent.settimeout(0.01)
            with pytest.raises(TimeoutError):
                silent.recv(1)
            silent.settimeout(20)
            daemon.open_gate("m", "load_gate")
            answer = read_until(silent, b"\r\n\r\n")
    assert b"loading model" not in answer
    assert b"X-Sidecar-Hash" in answer


@pytest.mark.parametrize("value", ["", "yes", "comments, comments", "Comments"])
def test_another_wish_is_refused(tmp_path: Path, value: str) -> None:
    with running_daemon(tmp_path, {"m": {}}) as daemon:
        body = {"model": "m", "stream": True}
        status, _, answer = daemon.ask("POST", CHAT, body, {"X-Sidecar-Progress": value})
        assert daemon.starts("m") == []
    assert (status, answer["error"]["code"]) == (400, "invalid_header")
    assert answer["error"]["param"] == "X-Sidecar-Progress"


def test_the_official_client_reads_past_the_comments(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")  # it has no place in the Windows Python
    models = {"m": {"load_seconds": 2.5}}
    with running_daemon(tmp_path, models) as daemon:
        base_url = f"http://127.0.0.1:{daemon.port}/v1"
        with openai.OpenAI(base_url=base_url, api_key="x", max_retries=0, timeout=30) as client:
            stream = client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "count"}],
                stream=True,
                extra_headers=WISH,
            )
            with stream:
                texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == " one two three four five"


def cut_off(sock: socket.socket, begun: bytes) -> dict[str, Any]:
    """The error event that is the last thing sent, ahead of a cut."""
    _, events, is_ended = split(begun + read_all(sock))
    assert not is_ended
    assert [event for event in events[:-1] if not event.startswith(": ")] == []
    (data,) = [line for line in events[-1].splitlines() if line.startswith("data: ")]
    found: dict[str, Any] = json.loads(data.removeprefix("data: "))
    return found


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_load_that_fails_after_a_comment_is_an_error_event_and_a_cut(
    tmp_path: Path, path: str
) -> None:
    fails = {"load_gate": True, "exit_on_load": {"code": 7, "message": "E no such\ttensor"}}
    with running_daemon(tmp_path, {"m": fails}) as daemon, ask(daemon, "m", path=path) as sock:
        begun = read_until(sock, b"\n\n\r\n")
        daemon.open_gate("m", "load_gate")
        more = read_until(sock, b"data: ")
        error = cut_off(sock, begun + more)["error"]
    assert (b"event: error\n" in more) == (path == MESSAGES)
    assert error["code"] == "model_load_failed"
    assert "exit code 7" in error["message"]


def test_a_queue_that_takes_too_long_after_a_comment_is_an_error_event_and_a_cut(
    tmp_path: Path,
) -> None:
    models = {"m": {"load_gate": True}}
    env = {"LLAMA_SIDECAR_QUEUE_SECONDS": "1.6"}
    with running_daemon(tmp_path, models, **env) as daemon, ask(daemon, "m") as sock:
        error = cut_off(sock, read_until(sock, b"\n\n\r\n"))["error"]
    assert error["code"] == "load_timeout"
    assert error["type"] == "server_error"


def test_a_shutdown_after_a_comment_is_an_error_event_and_a_cut(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon:
        with ask(daemon, "m") as sock:
            begun = read_until(sock, b"\n\n\r\n")
            daemon.send_signal(signal.SIGTERM)
            error = cut_off(sock, begun)["error"]
        assert daemon.process.wait(20) == 0
    assert error["code"] == "shutting_down"


@pytest.mark.parametrize(
    ("fake", "code"),
    [
        ({"answer_status": 400, "answer_body": {"error": {"code": 400, "message": "no"}}}, 400),
        (
            {"answer_status": 503, "answer_body": '{"error":\n{"code": 503,\r\n"message": "no"}}'},
            503,
        ),
        ({"die_before_answer": True}, "upstream_failed"),
        ({"half_header": "close"}, "upstream_failed"),
    ],
)
def test_a_child_that_refuses_after_a_comment_is_an_error_event_and_a_cut(
    tmp_path: Path, fake: dict[str, object], code: object
) -> None:
    with (
        running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon,
        ask(daemon, "m", fields={"fake": fake}) as sock,
    ):
        begun = read_until(sock, b"\n\n\r\n")
        daemon.open_gate("m", "load_gate")
        assert cut_off(sock, begun)["error"]["code"] == code


def test_a_stream_whose_length_is_known_is_chunked_after_comments(tmp_path: Path) -> None:
    fake = {
        "answer_status": 200,
        "answer_body": "data: {}\n\ndata: [DONE]\n\n",
        "extra_headers": {"Content-Type": "text/event-stream"},
    }
    with (
        running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon,
        ask(daemon, "m", fields={"fake": fake}) as sock,
    ):
        begun = read_until(sock, b"\n\n\r\n")
        daemon.open_gate("m", "load_gate")
        _, events, is_ended = split(begun + read_until(sock, b"\r\n0\r\n\r\n"))
    assert events[-2:] == ["data: {}", "data: [DONE]"]
    assert is_ended


def test_a_stream_that_breaks_after_comments_is_cut(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon,
        ask(daemon, "m", fields={"fake": {"close_mid_chunk": 2}}) as sock,
    ):
        begun = read_until(sock, b"\n\n\r\n")
        daemon.open_gate("m", "load_gate")
        _, events, is_ended = split(begun + read_all(sock))
    assert not is_ended
    assert sum(event.startswith("data: ") for event in events) >= 2


def test_a_client_that_leaves_after_a_comment_gives_up_its_place(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon:
        with ask(daemon, "m") as sock:
            read_until(sock, b"\n\n\r\n")
            assert daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 1
        wait_until(
            lambda: daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 0, "its wait is over"
        )
        daemon.open_gate("m", "load_gate")
        wait_until(lambda: daemon.sidecars()[0]["state"] == "ready", "the load goes on")
        assert daemon.sidecars()[0]["requests_total"] == 0


def test_the_connection_serves_again_after_comments(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, {"m": {"load_gate": True}}) as daemon,
        ask(daemon, "m") as sock,
    ):
        read_until(sock, b"\n\n\r\n")
        daemon.open_gate("m", "load_gate")
        read_until(sock, b"\r\n0\r\n\r\n")
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
