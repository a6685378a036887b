"""The client: what it sends, which failures it waits for, and how it calls the others."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.client import AskError, Client, greedy
from tests import real_parts
from tests.daemon import settings_of, started_daemon, wait_until

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
CHAT = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}


def answer(status: str, body: object, *fields: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + data


class Scripted:
    """A server that gives its answers one after another, whatever is asked.

    b"" closes the connection instead; after an answer with `Connection: close` too.
    """

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_over = threading.Event()  # holds what an answer of None waits for

    def serve(self) -> None:
        while self.answers:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with sock, contextlib.suppress(OSError):
                while self.answers and self._serve_one(sock):
                    pass

    def close(self) -> None:
        self.is_over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve_one(self, sock: socket.socket) -> bool:
        request = read_request(sock)
        if not request:
            return False
        self.requests.append(request)
        said = self.answers.pop(0)
        if said == b"silence":
            self.is_over.wait(60)
            return False
        sock.sendall(said)
        return said != b"" and b"Connection: close" not in said


def read_request(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    sizes = [line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"Content-L")]
    while len(body) < int(sizes[0] if sizes else 0):
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def scripted(*answers: bytes) -> Iterator[Scripted]:
    server = Scripted(list(answers))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(20)


def test_a_chat_is_sent_and_read_on_one_connection() -> None:
    full = {
        "choices": [
            {
                "message": {"content": "yes", "reasoning_content": "hm", "tool_calls": [{"id": 1}]},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        "timings": {"prompt_n": 4, "prompt_ms": 1.5, "predicted_n": 2, "predicted_ms": 2.5},
        "system_fingerprint": "b1",
    }
    replies = [answer("200 OK", full, "X-Sidecar-Hash: abc"), answer("200 OK", CHAT)]
    with scripted(*replies) as server, Client(server.url + "/v1/", api_key="k") as client:
        first = client.chat(HELLO | greedy(7, 3), "-c 512")
        second = client.chat(HELLO)
    assert server.connections == 1
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    for field in (b"X-Agent-Flags: -c 512", b"Authorization: Bearer k", b"X-Sidecar-Exact: 1"):
        assert field in head.split(b"\r\n")
    sampling = {"temperature": 0, "seed": 3, "cache_prompt": False, "max_tokens": 7}
    assert json.loads(body) == HELLO | sampling
    assert b"X-Agent-Flags" not in server.requests[1]
    assert (first.reply, first.reasoning, first.finish_reason) == ("yes", "hm", "stop")
    assert (first.tool_calls, first.build, first.sidecar) == ([{"id": 1}], "b1", "abc")
    assert first.measured["prompt_n"] == 4
    assert first.measured["wall_ms"] > 0
    assert second.measured["predicted_n"] is None


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests"])
def test_a_busy_server_is_waited_for(status: str) -> None:
    busy = answer(status, {"error": {"message": "full", "code": "pool_busy"}}, "Retry-After: 0.2")
    with scripted(busy, busy, answer("200 OK", CHAT)) as server, Client(server.url) as client:
        begun = time.perf_counter()  # time.monotonic() goes in steps of 16 ms on Windows
        assert client.chat(HELLO).reply == "yes"
    assert time.perf_counter() - begun >= 0.4
    assert len(server.requests) == 3


def test_a_server_that_stays_busy_is_given_up_on_after_a_while() -> None:
    busy = answer("503 Service Unavailable", {"error": {"message": "full"}}, "Retry-After: 1000000")
    with (
        scripted(busy) as server,
        Client(server.url, patience_s=1.0) as client,
        pytest.raises(AskError, match="full") as caught,
    ):
        client.chat(HELLO)
    assert caught.value.is_retryable
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("said", "is_retryable", "is_hopeless", "words"),
    [
        (answer("400 Bad Request", {"error": {"message": "too long"}}), False, False, "too long"),
        (
            answer("400 Bad Request", {"error": {"message": "-x", "code": "invalid_flags"}}),
            *(False, True, "-x"),
        ),
        (answer("401 Unauthorized", {"error": {"message": "key"}}), False, True, "key"),
        (answer("404 Not Found", b"<html>nothing here"), False, True, "nothing here"),
        (answer("500 Oh", {"error": "text"}), True, False, "500 Oh"),
        (answer("502 Bad Gateway", {"error": {"message": "died", "code": 502}}), True, False, "d"),
        (answer("504 Late", b""), True, False, "504"),
        (answer("302 Found", b"", "Location: /"), True, False, "302"),
        (answer("200 OK", b"{"), True, False, "no JSON"),
        (answer("200 OK", {}), True, False, "not OpenAI's"),
        (answer("200 OK", []), True, False, "not OpenAI's"),
        (answer("200 OK", {"choices": []}), True, False, "not OpenAI's"),
        (answer("200 OK", {"choices": [{"message": {"content": 1}}]}), True, False, "not OpenAI's"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{",
            True,
            False,
            "off|Inc",
        ),
        (b"nonsense\r\n\r\n", True, False, "BadStatusLine"),
    ],
)
def test_failures_are_told_apart(
    said: bytes, is_retryable: bool, is_hopeless: bool, words: str
) -> None:
    with (
        scripted(said) as server,
        Client(server.url, timeout_s=5) as client,
        pytest.raises(AskError, match=words) as caught,
    ):
        client.chat(HELLO)
    assert (caught.value.is_retryable, caught.value.is_hopeless) == (is_retryable, is_hopeless)


def test_a_connection_that_was_closed_meanwhile_is_opened_again() -> None:
    yes = answer("200 OK", CHAT)
    last = answer("200 OK", CHAT, "Connection: close")
    with scripted(yes, b"", last, yes) as server, Client(server.url) as client:
        for _ in range(3):
            assert client.chat(HELLO).reply == "yes"
    assert server.connections == 3


def test_an_answer_in_chunks_is_read_to_its_end() -> None:
    data = json.dumps(CHAT).encode()
    pieces = [data[:7], data[7:]]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole, torn = head + chunks + b"0\r\n\r\n", head + chunks[:-9]
    with scripted(whole, whole, torn) as server, Client(server.url, timeout_s=5) as client:
        assert [client.chat(HELLO).reply for _ in range(2)] == ["yes", "yes"]
        assert server.connections == 1
        server.answers.append(b"")
        with pytest.raises(AskError):
            client.chat(HELLO)


def test_nobody_listening_is_an_error_that_may_pass() -> None:
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(AskError, match="refused") as caught,
    ):
        client.chat(HELLO)
    assert caught.value.is_retryable


def test_silence_ends_with_the_time_limit() -> None:
    with (
        scripted(b"silence") as server,
        Client(server.url, timeout_s=0.3) as client,
        pytest.raises(AskError, match=r"no answer within 0\.3 s") as caught,
    ):
        client.chat(HELLO)
    assert caught.value.is_retryable


def test_a_call_can_be_cut_off_by_another_thread() -> None:
    failures: list[AskError] = []

    def ask(client: Client) -> None:
        try:
            client.chat(HELLO)
        except AskError as exc:
            failures.append(exc)

    yes = answer("200 OK", CHAT)
    with scripted(yes, b"silence", yes) as server, Client(server.url) as client:
        client.chat(HELLO)
        thread = threading.Thread(target=ask, args=(client,))
        thread.start()
        wait_until(lambda: len(server.requests) == 2, "it was asked")
        client.abort()
        thread.join(20)
        assert not thread.is_alive()
    assert len(failures) == 1
    assert len(server.requests) == 2  # not sent again on another connection


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8402", "ftp://x", "http://", "http://x:port", "http://me:key@x"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"address|ort"):
        Client(address)


@pytest.mark.parametrize(
    ("logprobs", "tokens"),
    [
        (None, ()),
        (
            {"content": [{"top_logprobs": [{"token": " A", "logprob": -1.0, "id": 3}]}]},
            ((" A", -1.0),),
        ),
        ({"tokens": [" A"], "top_logprobs": [{" A": -1.0, "B": -2}]}, ((" A", -1.0), ("B", -2.0))),
    ],
)
def test_candidates_for_the_first_token_are_read(logprobs: object, tokens: object) -> None:
    value = {"choices": [{"text": " A", "finish_reason": "length", "logprobs": logprobs}]}
    with scripted(answer("200 OK", value)) as server, Client(server.url) as client:
        got = client.complete({"prompt": "x"})
    assert server.requests[0].startswith(b"POST /v1/completions ")
    assert (got.reply, got.tokens) == (" A", tokens)


@pytest.mark.integration
def test_the_daemon_is_asked_for_answers_models_and_sidecars(tmp_path: Path) -> None:
    settings = settings_of(
        real_parts.llama_server_bin(),
        tmp_path,
        {"tiny": str(real_parts.tiny())},
        base_args=["-c", "1024", "-t", "1"],
    )
    with (
        started_daemon(settings, tmp_path) as daemon,
        Client(f"http://127.0.0.1:{daemon.port}") as client,
    ):
        assert client.models() == ["tiny"]
        assert client.props() == {}
        plain = client.chat(HELLO | greedy(5, 1))
        own = client.complete({"model": "tiny", "prompt": "x", "logprobs": 3} | greedy(1, 1))
        smaller = client.chat(HELLO | greedy(5, 1), "-c 512")
        with pytest.raises(AskError, match="nothing") as caught:
            client.chat(HELLO | {"model": "nothing"})
        hashes = {row["hash"]: row["args"] for row in client.sidecars()}
    assert (plain.reply, plain.finish_reason) == (" one two three four five", "length")
    assert own.tokens[0][0] == " one"
    assert caught.value.is_hopeless
    assert plain.sidecar == own.sidecar != smaller.sidecar  # a larger context will not do
    assert "512" in hashes[smaller.sidecar]
