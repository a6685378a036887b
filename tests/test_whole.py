"""Answers put together from a stream: what the client would have got without one."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama_sidecar import (
    MalformedMessage,
    WholeAnswer,
    WholeChat,
    WholeCompletion,
    WholeMessage,
    WholeResponse,
)
from tests.daemon import CHAT, Daemon, running_daemon, wait_until

TEXT, MESSAGES, RESPONSES = "/v1/completions", "/v1/messages", "/v1/responses"


def event(name: str = "", **fields: object) -> bytes:
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {json.dumps(fields)}\n\n".encode()


def said(finish_reason: str | None = None, **delta: object) -> bytes:
    choice = {"index": 0, "finish_reason": finish_reason, "delta": delta}
    return event(choices=[choice], id="c1", object="chat.completion.chunk")


def told(finish_reason: str | None = None, text: str = "") -> bytes:
    choice = {"index": 0, "finish_reason": finish_reason, "text": text, "logprobs": None}
    return event(choices=[choice], id="c1", object="text_completion")


def call(index: int, arguments: str, **head: str) -> bytes:
    function = {"name": head.pop("name")} if "name" in head else {}
    return said(
        tool_calls=[{"index": index, **head, "function": function | {"arguments": arguments}}]
    )


def chat(finish_reason: str, message: dict[str, Any], **more: object) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish_reason}
    choice["message"] = {"role": "assistant", "content": ""} | message
    return {"choices": [choice], "id": "c1", "object": "chat.completion"} | more


def named(kind: str, **fields: object) -> bytes:
    return event(kind, type=kind, **fields)


DONE = b"data: [DONE]\n\n"
START = said(role="assistant", content=None)
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
TWO_CALLS = [
    {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}},
    {"id": "b", "type": "function", "function": {"name": "find", "arguments": "{}"}},
]
MESSAGE = {"id": "m1", "type": "message", "role": "assistant"}
DELTA = "content_block_delta"
BLOCK = "content_block_start"
MESSAGE_STREAM = [
    named("message_start", message=MESSAGE | {"content": [], "usage": {"in": 4, "out": 0}}),
    named(BLOCK, index=0, content_block={"type": "thinking", "thinking": ""}),
    named(DELTA, index=0, delta={"type": "thinking_delta", "thinking": "I lo"}),
    named(DELTA, index=0, delta={"type": "thinking_delta", "thinking": "ok"}),
    named(BLOCK, index=1, content_block={"type": "text", "text": ""}),
    named(DELTA, index=1, delta={"type": "text_delta", "text": "Sun"}),
    named(BLOCK, index=2, content_block={"type": "tool_use", "id": "t", "name": "look"}),
    named(DELTA, index=2, delta={"type": "input_json_delta", "partial_json": '{"x"'}),
    named(DELTA, index=2, delta={"type": "input_json_delta", "partial_json": ":1}"}),
    named(BLOCK, index=3, content_block={"type": "tool_use", "id": "u", "name": "find"}),
    named(DELTA, index=3, delta={"type": "input_json_delta", "partial_json": "{cut o"}),
    named(DELTA, index=0, delta={"type": "signature_delta", "signature": ""}),
    named("content_block_stop", index=0),
    named("message_delta", delta={"stop_reason": "tool_use"}, usage={"out": 9}),
    named("message_stop"),
]
MESSAGE_WHOLE = MESSAGE | {
    "content": [
        {"type": "thinking", "thinking": "I look", "signature": ""},
        {"type": "text", "text": "Sun"},
        {"type": "tool_use", "id": "t", "name": "look", "input": {"x": 1}},
        {"type": "tool_use", "id": "u", "name": "find", "input": {}},
    ],
    "usage": {"in": 4, "out": 9},
    "stop_reason": "tool_use",
}
ITEM = {"type": "reasoning", "content": []}
RESPONSE = {"id": "r1", "object": "response", "created_at": 5, "output": [ITEM]}

CASES: dict[str, tuple[type[WholeAnswer], list[bytes], dict[str, Any]]] = {
    "text": (
        WholeChat,
        [START, said(content="Hel"), said(content="lo"), said("stop"), DONE],
        chat("stop", {"content": "Hello"}),
    ),
    "nothing at all": (WholeChat, [START, said("length"), DONE], chat("length", {})),
    "reasoning before text": (
        WholeChat,
        [said(reasoning_content="I "), said(reasoning_content="think"), said(content="so"), DONE],
        chat(None, {"reasoning_content": "I think", "content": "so"}),  # type: ignore[arg-type]
    ),
    "tool calls, interleaved": (
        WholeChat,
        [
            call(1, "", id="b", type="function", name="find"),
            call(0, '{"x"', id="a", type="function", name="look"),
            call(1, "{}"),
            call(0, ":1}"),
            said("tool_calls"),
            DONE,
        ],
        chat("tool_calls", {"tool_calls": TWO_CALLS}),
    ),
    "usage, timings and what nobody knows yet": (
        WholeChat,
        [
            said(content="Hi"),
            said("stop"),
            event(choices=[], usage=USAGE, timings={"n": 1}, brand_new=[7], nothing=None),
            DONE,
        ],
        chat("stop", {"content": "Hi"}, usage=USAGE, timings={"n": 1}, brand_new=[7]),
    ),
    "progress is of streams alone": (
        WholeChat,
        [event(choices=[], prompt_progress={"total": 9}), said("stop", content="Hi"), DONE],
        chat("stop", {"content": "Hi"}),
    ),
    "comments and pings": (
        WholeChat,
        [b":\n\n", b": ping\n\n", said(content="Hi"), b"\n\n", said("stop"), b"id: 4\n\n", DONE],
        chat("stop", {"content": "Hi"}),
    ),
    "a completion": (
        WholeCompletion,
        [told(text="one"), told(text=" two"), told("length"), DONE],
        {
            "choices": [
                {"index": 0, "finish_reason": "length", "text": "one two", "logprobs": None}
            ],
            "id": "c1",
            "object": "text_completion",
        },
    ),
    "a message": (WholeMessage, MESSAGE_STREAM, MESSAGE_WHOLE),
    "a response": (
        WholeResponse,
        [
            named("response.created", response={"id": "r1"}),
            named("response.output_text.delta", delta="Hi"),
            named("response.completed", response=RESPONSE),
        ],
        RESPONSE | {"completed_at": 5, "output": [ITEM | {"status": "completed"}]},
    ),
}


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(("kind", "stream", "whole"), CASES.values(), ids=list(CASES))
def test_a_stream_becomes_the_whole_answer_wherever_it_is_split(
    kind: type[WholeAnswer], stream: list[bytes], whole: dict[str, Any], piece_bytes: int
) -> None:
    answer, data = kind(), b"".join(stream)
    for start in range(0, len(data), piece_bytes):
        assert not answer.is_complete
        answer.feed(data[start : start + piece_bytes])
    assert answer.is_complete
    assert answer.answer() == (200, whole)


@pytest.mark.parametrize(("kind", "stream", "_whole"), CASES.values(), ids=list(CASES))
def test_a_stream_without_its_end_is_not_complete(
    kind: type[WholeAnswer], stream: list[bytes], _whole: dict[str, Any]
) -> None:
    answer = kind()
    answer.feed(b"".join(stream[:-1]))
    assert not answer.is_complete
    answer.feed(stream[-1][:-1])
    assert not answer.is_complete


@pytest.mark.parametrize("kind", [WholeChat, WholeCompletion, WholeMessage, WholeResponse])
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [(400, 400), (503, 503), (599, 599), (399, 500), (600, 500), ("400", 500), (None, 500)],
)
def test_an_error_in_the_stream_becomes_an_answer_with_its_status(
    kind: type[WholeAnswer], is_named: bool, code: object, status: int
) -> None:
    error = {"code": code, "message": "it broke"}
    answer = kind()
    answer.feed(event("error", **error) if is_named else event(error=error))
    assert answer.is_complete
    assert answer.answer() == (status, {"error": error})


NONSENSE: list[tuple[type[WholeAnswer], bytes]] = [
    (WholeChat, b"{"),
    (WholeChat, b"\xff"),
    (WholeChat, b""),
    (WholeChat, b"5"),
    (WholeChat, b"null"),
    (WholeChat, b'["error"]'),
    (WholeChat, b'"error"'),
    (WholeChat, b'{"error":"text"}'),
    (WholeChat, b'{"choices":5}'),
    (WholeChat, b'{"choices":["text"]}'),
    (WholeChat, b'{"choices":[{"delta":7}]}'),
    (WholeChat, b'{"choices":[{"delta":{"content":7}}]}'),
    (WholeChat, b'{"choices":[{"delta":{"tool_calls":7}}]}'),
    (WholeChat, b'{"choices":[{"delta":{"tool_calls":[{}]}}]}'),
    (WholeChat, b'{"choices":[{"delta":{"tool_calls":[{"index":"x"}]}}]}'),
    (WholeChat, b'{"choices":[{"delta":{"tool_calls":[{"index":0,"function":7}]}}]}'),
    (WholeChat, b"[" * 100_000),
    (WholeCompletion, b'{"choices":[{"text":7}]}'),
    (WholeMessage, b"{}"),
    (WholeMessage, b'{"type":"message_start"}'),
    (WholeMessage, b'{"type":"message_delta","delta":{},"usage":{}}'),
    (WholeMessage, b'{"type":"content_block_delta","index":0,"delta":{}}'),
    (WholeMessage, b'{"type":"content_block_start","index":[],"content_block":{}}'),
    (WholeResponse, b"{}"),
    (WholeResponse, b'{"type":"response.completed","response":{}}'),
]


@pytest.mark.parametrize(("kind", "data"), NONSENSE, ids=[str(n) for n in range(len(NONSENSE))])
def test_an_event_that_makes_no_sense_is_said_to_be_malformed(
    kind: type[WholeAnswer], data: bytes
) -> None:
    with pytest.raises(MalformedMessage, match="makes no sense"):
        kind().feed(b"data: " + data + b"\n\n")


def test_a_delta_for_a_block_that_never_began_is_malformed() -> None:
    answer = WholeMessage()
    answer.feed(named(DELTA, index=5, delta={"type": "text_delta", "text": "x"}))
    with pytest.raises(MalformedMessage, match="makes no sense"):
        answer.feed(named("message_stop"))


# --- through the daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("whole")
    with running_daemon(folder, {"m": {}, "left": {}, "fragile": {}}) as running:
        yield running


def chunks_sent(daemon: Daemon, answer: dict[str, Any]) -> int:
    """How many chunks of a stream the child made of this answer."""
    own = answer["echo"]["id"]
    done = wait_until(
        lambda: [row for row in daemon.events("m", "done") if row["id"] == own], "it is noted"
    )
    return int(done[0]["chunks"])


def without_volatile(answer: dict[str, Any]) -> dict[str, Any]:
    """All but what differs between two answers to one question."""
    own = ("id", "created", "created_at", "completed_at", "echo", "system_fingerprint")
    return {name: value for name, value in answer.items() if name not in own}


def direct(daemon: Daemon, path: str, body: dict[str, object]) -> tuple[int, dict[str, Any]]:
    """The child's own answer in one piece, past the daemon."""
    start = daemon.starts("m")[-1]
    connection = http.client.HTTPConnection("127.0.0.1", start["port"], timeout=20)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {start['env']['LLAMA_API_KEY']}"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


CALLS = [["look", '{"x": [1, 2]}'], ["find", "{}"]]
ASKED: list[tuple[str, dict[str, object]]] = [
    (CHAT, {"max_tokens": 4}),
    (CHAT, {"max_tokens": 0}),
    (CHAT, {"max_tokens": 3, "stream": False}),
    (CHAT, {"fake": {"reasoning": "I think so", "compact": True}}),
    (CHAT, {"fake": {"tool_calls": CALLS, "reasoning": "hm"}}),
    (CHAT, {"fake": {"tool_calls": CALLS, "chunks": 0, "compact": True}}),
    (CHAT, {"fake": {"chunk_split": 3}}),
    (TEXT, {"prompt": "x", "max_tokens": 4}),
    (MESSAGES, {"max_tokens": 4}),
    (MESSAGES, {"fake": {"tool_calls": CALLS, "reasoning": "hm", "compact": True}}),
    (RESPONSES, {"fake": {"tool_calls": CALLS}}),
]


@pytest.mark.parametrize(("path", "fields"), ASKED)
def test_the_answer_is_the_childs_own_in_one_piece(
    daemon: Daemon, path: str, fields: dict[str, object]
) -> None:
    body = {"model": "m", "messages": [], **fields}
    status, headers, answer = daemon.ask("POST", path, body)
    assert (status, headers["content-type"]) == (200, "application/json; charset=utf-8")
    assert int(headers["content-length"]) > 0
    assert "transfer-encoding" not in headers
    assert "x-accel-buffering" not in headers
    wanted = direct(daemon, path, body)
    assert (status, without_volatile(answer)) == (wanted[0], without_volatile(wanted[1]))


def test_the_child_is_asked_to_stream_and_to_tell_the_usage(daemon: Daemon) -> None:
    body = b'{"model":"m","messages":[], "stream" : false,"seed":7}'
    sent = b'{"model":"m","messages":[], "stream" : true,"seed":7,"stream_options":'
    sent += b'{"include_usage":true}}'
    _, _, answer = daemon.ask("POST", CHAT, body)
    assert answer["echo"]["body_sha256"] == hashlib.sha256(sent).hexdigest()
    assert answer["usage"]["total_tokens"] == 12


UNTOUCHED: list[tuple[str, dict[str, object]]] = [
    (CHAT, {"n": 2}),
    (CHAT, {"n_cmpl": 2}),
    (CHAT, {"logprobs": True, "top_logprobs": 2}),
    (CHAT, {"n_probs": 2}),
    (CHAT, {"stop": ["x"]}),
    (CHAT, {"stop": "x"}),
    (CHAT, {"verbose": True}),
    (TEXT, {"prompt": ["a", "b"]}),
    (TEXT, {"prompt": [1, 2]}),
    (TEXT, {"prompt": "x", "logprobs": 2}),
    (MESSAGES, {"stop_sequences": ["x"]}),
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ("/v1/messages/count_tokens", {"messages": []}),
]


@pytest.mark.parametrize(("path", "fields"), UNTOUCHED)
def test_what_a_stream_would_not_tell_whole_reaches_the_child_as_it_was(
    daemon: Daemon, path: str, fields: dict[str, object]
) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    _, _, answer = daemon.ask("POST", path, body)
    assert answer["echo"]["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert chunks_sent(daemon, answer) == 0


@pytest.mark.parametrize(
    "fields",
    [{"n": 1}, {"n": None}, {"stop": []}, {"stop": None}, {"logprobs": False}, {"n_probs": 0}],
    ids=str,
)
def test_a_field_that_asks_for_nothing_does_not_matter(
    daemon: Daemon, fields: dict[str, object]
) -> None:
    status, _, answer = daemon.ask("POST", CHAT, {"model": "m", **fields})
    assert (status, chunks_sent(daemon, answer)) == (200, 5)


def test_a_stop_word_among_the_flags_counts_as_one_in_the_body(daemon: Daemon) -> None:
    _, _, answer = daemon.chat("m", "-r STOP")
    assert chunks_sent(daemon, answer) == 0


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, RESPONSES])
def test_an_error_in_the_childs_stream_is_told_with_its_status(daemon: Daemon, path: str) -> None:
    body = {"model": "m", "prompt": "x", "fake": {"error_mid_stream": 2}}
    status, _, answer = daemon.ask("POST", path, body)
    error = {"code": 500, "message": "it broke", "type": "server_error"}
    assert (status, answer) == (500, {"error": error})


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_an_error_instead_of_the_stream_passes_as_it_is(daemon: Daemon, status: int) -> None:
    error = {"error": {"code": status, "message": "no", "type": "exceed_context_size_error"}}
    got = daemon.chat("m", fake={"answer_status": status, "answer_body": error})
    assert (got[0], got[2]) == (status, error)


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, RESPONSES])
@pytest.mark.parametrize(
    "fake",
    [{"close_mid_chunk": 2}, {"bad_chunk": 2}, {"die_mid_stream": 2, "die_code": 9}],
    ids=str,
)
def test_a_stream_that_breaks_off_is_a_502(
    daemon: Daemon, path: str, fake: dict[str, object]
) -> None:
    body = {"model": "fragile", "prompt": "x", "fake": fake}
    status, _, answer = daemon.ask("POST", path, body)
    assert (status, answer["error"]["code"]) == (502, "upstream_failed")
    if "die_code" in fake:
        assert "exit code 9" in answer["error"]["message"]


def test_a_stream_that_ends_without_its_last_event_is_a_502(daemon: Daemon) -> None:
    canned = {"answer_status": 200, "answer_body": "data: {}\n\n"}
    fake = canned | {"extra_headers": {"Content-Type": "text/event-stream"}}
    status, _, answer = daemon.chat("fragile", fake=fake)
    assert (status, answer["error"]["code"]) == (502, "upstream_failed")


def test_a_client_that_leaves_ends_the_childs_stream(daemon: Daemon) -> None:
    with daemon.connect() as sock:
        body = b'{"model":"left","messages":[],"fake":{"hang_mid_stream":1}}'
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
            % (CHAT.encode(), len(body), body)
        )
        wait_until(lambda: CHAT in str(daemon.events("left", "request")), "the child has it")
    gone = wait_until(lambda: daemon.events("left", "disconnect"), "the child hears of it", 5)
    assert gone[0]["phase"] in ("stream", "prefill")
    wait_until(lambda: not [r for r in daemon.sidecars() if r["in_flight"]], "its lease ends", 5)
