"""The relay: what goes to the child and what comes back, over real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import CHAT, Daemon, killed_by, read_all, read_until, running_daemon, wait_until

MODELS: dict[str, dict[str, object]] = {
    "plain": {},
    "gated": {},
    "choir": {},
    "frail": {},
    "breaking": {},
    "fresh": {},
    "one-shot": {"keepalive_max": 1},
    "three-shot": {"keepalive_max": 3},
    "closing": {"connection_close": True},
    "left-mid-stream": {},
    "left-in-prefill": {},
    "left-waiting": {},
    "left-while-streaming": {},
    "sized": {},
}
SPLIT_WORDS = ["naïve", "日本語", "😀👩‍👩‍👧", "Ω"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("proxy")
    with running_daemon(folder, MODELS, MAX_SIDECARS="16") as running:
        yield running


def request_bytes(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """A chat request, framed by Content-Length."""
    lines = [
        f"POST {CHAT} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat_body(model: str, **fields: object) -> bytes:
    return json.dumps({"model": model, "messages": [], **fields}).encode()


def answer_until_close(daemon: Daemon, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the one answer, body with its chunking."""
    with contextlib.closing(daemon.connect()) as sock:
        sock.sendall(request)
        head, end, body = read_all(sock).partition(b"\r\n\r\n")
    assert end, f"no whole head: {head!r}"
    return head, body


def dechunked(body: bytes) -> bytes:
    """The payload of a chunked body that is whole; AssertionError otherwise."""
    payload = b""
    while True:
        line, _, body = body.partition(b"\r\n")
        size = int(line, 16)
        payload += body[:size]
        assert body[size : size + 2] == b"\r\n", "a chunk does not end where its size says"
        body = body[size + 2 :]
        if size == 0:
            assert body == b"", "bytes after the last chunk"
            return payload


def events_of(payload: bytes) -> list[dict[str, Any]]:
    """The JSON events of a whole stream, which must end with [DONE]."""
    *rows, done, rest = payload.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(row.removeprefix(b"data: ")) for row in rows]


def words_of(payload: bytes) -> str:
    choices = [event["choices"][0]["delta"] for event in events_of(payload)]
    return "".join(delta.get("content") or "" for delta in choices)


def in_flight(daemon: Daemon, model: str) -> int:
    return sum(row["in_flight"] for row in daemon.sidecars() if row["model_id"] == model)


def child_headers(answer: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in answer["echo"]["headers"]}


# --- towards the child


BODIES = {
    "odd spaces and a repeated key": b'{ "model" :"x",\r\n\t"model":"plain" , "n": 1e0 }\n',
    "text beyond ASCII, unescaped": '{"model": "plain", "say": "é日😀"}'.encode(),
    "a big one": b'{"model": "plain", "pad": "' + b"p" * 3_000_000 + b'"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_reaches_the_child_byte_for_byte(daemon: Daemon, body: bytes) -> None:
    status, _, answer = daemon.ask("POST", "/v1/embeddings", body)
    assert status == 200
    assert answer["echo"]["body_sha256"] == hashlib.sha256(body).hexdigest()


def test_an_upload_of_arbitrary_bytes_reaches_the_child(daemon: Daemon) -> None:
    body = bytes(range(256)) * 64
    kind = "multipart/form-data; boundary=x"
    status, _, answer = daemon.ask(
        "POST", "/v1/audio/transcriptions", body, {"Content-Type": kind, "X-Model-Id": "plain"}
    )
    assert status == 200
    assert answer["echo"]["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert child_headers(answer)["content-type"] == kind


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_chunked_upload_reaches_the_child_joined(daemon: Daemon, size: int) -> None:
    body = chat_body("plain", pad="日" * 50)
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%X;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n"
    )
    _, answer = answer_until_close(daemon, head + chunks + b"0\r\nX-Trailer: dropped\r\n\r\n")
    echo = json.loads(answer)["echo"]
    assert echo["body_sha256"] == hashlib.sha256(body).hexdigest()
    names = [name.lower() for name, _ in echo["headers"]]
    assert "transfer-encoding" not in names
    assert "x-trailer" not in names
    assert names.count("content-length") == 1


def test_path_and_query_reach_the_child(daemon: Daemon) -> None:
    target = "/v1/completions?a=%2F..%00&b"
    assert daemon.ask("POST", target, {"model": "plain"})[2]["echo"]["target"] == target


def test_what_is_the_clients_own_does_not_reach_the_child(daemon: Daemon) -> None:
    sent = {
        "Authorization": "Bearer the-clients-secret",
        "X-Api-Key": "the-clients-secret",
        "X-Conversation-Id": "conversation-7",
        "X-Agent-Id": "ann",
        "X-Sidecar-Exact": "0",
        "Cookie": "the-clients-secret",
        "X-Forwarded-For": "192.0.2.1",
        "X-Model-Id": "plain",
        "X-Agent-Flags": "--top-k 7",
        "Keep-Alive": "timeout=9",
        "Accept": "text/odd",
    }
    answer = daemon.ask("POST", CHAT, {"model": "plain"}, sent)[2]
    headers = child_headers(answer)
    key = daemon.starts("plain")[-1]["env"]["LLAMA_API_KEY"]
    assert headers == {
        "host": f"127.0.0.1:{answer['echo']['port']}",
        "authorization": f"Bearer {key}",
        "content-length": headers["content-length"],
        "content-type": "application/json",
        "accept": "text/odd",
    }


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/stream", "/v1/streams/lookup", "/v1/stream/conversation-7"])
def test_streams_of_others_cannot_be_asked_for(daemon: Daemon, method: str, path: str) -> None:
    body = {"model": "plain"} if method == "POST" else None
    status, _, answer = daemon.ask(method, path, body, {"X-Conversation-Id": "conversation-7"})
    assert (status, answer["error"]["code"]) == (404, "not_found")


# --- what an agent's flags put into the body


COUNTING = CHAT + "/input_tokens"  # takes the body of a chat, and is asked as it is
LIFTED = [
    (COUNTING, b'{"model":"plain"}', b'{"model":"plain","top_k":7}'),
    (COUNTING, b'{ "model" :"plain", "n": 1e0 }\n', b'{ "model" :"plain", "n": 1e0 ,"top_k":7}\n'),
    (COUNTING, b'{"model":"plain","top_k":null}', b'{"model":"plain","top_k":7}'),
    (COUNTING, b'{"model":"plain","top_k":5}', b'{"model":"plain","top_k":5}'),
    (COUNTING, '{"model":"plain","say":"é日😀"}'.encode(), None),
    (COUNTING, b'{"model":"plain","pad":"' + b"p" * 3_000_000 + b'"}', None),
    ("/v1/responses/input_tokens", b'{"model":"plain"}', b'{"model":"plain","top_k":7}'),
    ("/v1/messages/count_tokens", b'{"model":"plain"}', b'{"model":"plain","top_k":7}'),
    ("/v1/embeddings", b'{"model":"plain"}', b'{"model":"plain"}'),
]


@pytest.mark.parametrize(("path", "body", "sent"), LIFTED)
def test_a_flag_of_a_request_travels_in_its_body(
    daemon: Daemon, path: str, body: bytes, sent: bytes | None
) -> None:
    wanted = sent or body[:-1] + b',"top_k":7}'
    status, _, answer = daemon.ask("POST", path, body, {"X-Agent-Flags": "--top-k 7"})
    assert status == 200
    echo = answer["echo"]
    assert echo["body_sha256"] == hashlib.sha256(wanted).hexdigest()
    assert child_headers(answer)["content-length"] == str(len(wanted)) == str(echo["body_bytes"])
    assert "--top-k" not in echo["argv"]


def test_agents_that_differ_in_their_requests_share_a_process(daemon: Daemon) -> None:
    answers = [daemon.chat("plain", flags) for flags in (None, "--temp 0.1", "--temp 0.9")]
    assert len({answer["echo"]["pid"] for _, _, answer in answers}) == 1
    assert len({named["x-sidecar-hash"] for _, named, _ in answers}) == 1


def test_with_a_models_name_in_a_header_the_body_is_given_its_fields_too(daemon: Daemon) -> None:
    headers = {"X-Model-Id": "plain", "X-Agent-Flags": "--top-k 7"}
    answer = daemon.ask("POST", COUNTING, b'{"messages":[]}', headers)[2]
    sent = b'{"messages":[],"top_k":7}'
    assert answer["echo"]["body_sha256"] == hashlib.sha256(sent).hexdigest()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a":\xff}', b"[" * 200_000])
def test_a_body_that_cannot_be_given_a_field_is_refused(daemon: Daemon, body: bytes) -> None:
    headers = {"X-Model-Id": "plain", "X-Agent-Flags": "--top-k 7"}
    status, _, answer = daemon.ask("POST", CHAT, body, headers)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")
    assert answer["error"]["type"] == "invalid_request_error"


def test_an_upload_is_never_given_a_field(daemon: Daemon) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n\xff\x00\r\n--x--\r\n'
    headers = {
        "Content-Type": "multipart/form-data; boundary=x",
        "X-Model-Id": "plain",
        "X-Agent-Flags": "--temp 0.5",
    }
    answer = daemon.ask("POST", "/v1/audio/transcriptions", body, headers)[2]
    assert answer["echo"]["body_sha256"] == hashlib.sha256(body).hexdigest()
    argv = answer["echo"]["argv"]
    assert argv[argv.index("--temp") + 1] == "0.5"


# --- which process


def pid_of(daemon: Daemon, model: str, flags: str = "", **headers: str) -> int:
    named = {
        name.replace("_", "-"): value.encode().decode("latin-1") for name, value in headers.items()
    }
    flags_too = named | ({"X-Agent-Flags": flags} if flags else {})
    status, _, answer = daemon.ask("POST", CHAT, {"model": model}, flags_too)
    assert status == 200, answer
    return int(answer["echo"]["pid"])


def test_a_larger_context_serves_a_smaller_unless_it_must_be_exact(daemon: Daemon) -> None:
    large = pid_of(daemon, "sized", "-c 8192")
    assert pid_of(daemon, "sized", "-c 4096") == large
    assert pid_of(daemon, "sized", "-c 4096", X_Sidecar_Exact="0") == large
    small = pid_of(daemon, "sized", "-c 4096", X_Sidecar_Exact="1")
    assert small != large
    assert pid_of(daemon, "sized", "-c 4096") == small


def test_the_answer_names_the_process_that_gave_it(daemon: Daemon) -> None:
    pid_of(daemon, "sized", "-c 9000")
    _, large, _ = daemon.chat("sized", "-c 9000")
    _, small, _ = daemon.chat("sized", "-c 8999")
    assert small["x-sidecar-hash"] == large["x-sidecar-hash"]
    assert small["x-sidecar-start"] == "reused"


@pytest.mark.parametrize("wish", ["2", "true", "01", "é", "1, 1"])
def test_a_wish_that_means_nothing_is_refused(daemon: Daemon, wish: str) -> None:
    headers = {"X-Sidecar-Exact": wish.encode().decode("latin-1")}
    status, _, answer = daemon.ask("POST", CHAT, {"model": "sized"}, headers)
    assert (status, answer["error"]["code"]) == (400, "invalid_header")
    assert answer["error"]["param"] == "X-Sidecar-Exact"


def test_an_empty_wish_is_none(daemon: Daemon) -> None:
    assert pid_of(daemon, "plain", X_Sidecar_Exact="") == pid_of(daemon, "plain")


def test_agent_ids_are_ignored_where_nobody_is_isolated(daemon: Daemon) -> None:
    pids = {pid_of(daemon, "plain", X_Agent_Id=name) for name in ("ann", "bob", "x" * 500)}
    assert pids == {pid_of(daemon, "plain")}


def test_where_nothing_is_shared_each_set_of_flags_has_its_process(tmp_path: Path) -> None:
    env = {"MAX_SIDECARS": "8", "LLAMA_SIDECAR_SHARE": "off"}
    with running_daemon(tmp_path, {"m": {}}, **env) as daemon:
        flags = ["", "--temp 0.1", "--temp 0.9", "-c 8192", "-c 4096"]
        pids = [pid_of(daemon, "m", each) for each in flags]
        assert len(set(pids)) == len(flags)
        answer = daemon.chat("m", "--temp 0.1")[2]
        assert answer["echo"]["pid"] == pids[1]
        argv = answer["echo"]["argv"]
        assert argv[argv.index("--temp") + 1] == "0.1"
        body = b'{"model":"m"}'
        echo = daemon.ask("POST", COUNTING, body, {"X-Agent-Flags": "--temp 0.1"})[2]["echo"]
        assert echo["body_sha256"] == hashlib.sha256(body).hexdigest()


@pytest.fixture(scope="module")
def isolating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    env = {"MAX_SIDECARS": "8", "LLAMA_SIDECAR_ISOLATE": "agent"}
    with running_daemon(tmp_path_factory.mktemp("isolating"), {"m": {}}, **env) as running:
        yield running


def test_isolated_agents_have_processes_of_their_own(isolating: Daemon) -> None:
    nobody = pid_of(isolating, "m", "-c 4096")
    ann = pid_of(isolating, "m", "-c 8192", X_Agent_Id="ann")
    bob = pid_of(isolating, "m", "-c 4096", X_Agent_Id="bob")
    other = pid_of(isolating, "m", "-c 4096", X_Agent_Id="日本")
    assert len({nobody, ann, bob, other}) == 4
    assert pid_of(isolating, "m", "-c 8192 --temp 1", X_Agent_Id="ann") == ann
    assert pid_of(isolating, "m", "-c 4096", X_Agent_Id="ann") == ann, "it may use its own larger"
    assert pid_of(isolating, "m", "-c 4096", X_Agent_Id="bob") == bob
    assert pid_of(isolating, "m", "-c 4096", X_Agent_Id="") == nobody


@pytest.mark.parametrize("agent_id", ["x" * 129, "a\tb", "\u200e", "a\u00a0b", "\x85"])
def test_an_agent_id_that_cannot_be_shown_is_refused(isolating: Daemon, agent_id: str) -> None:
    headers = {"X-Agent-Id": agent_id.encode().decode("latin-1")}
    status, _, answer = isolating.ask("POST", CHAT, {"model": "m"}, headers)
    assert (status, answer["error"]["code"]) == (400, "invalid_header")
    assert answer["error"]["param"] == "X-Agent-Id"


def test_the_longest_agent_id_is_taken(isolating: Daemon) -> None:
    assert pid_of(isolating, "m", X_Agent_Id="x" * 128) != pid_of(isolating, "m")


# --- connections to the child


def chat_when_idle(daemon: Daemon, model: str, *, stream: bool = False) -> tuple[int, Any, Any]:
    """So that the connection to the child has been put back."""
    daemon.idle_sidecars()
    return daemon.chat(model, stream=stream)


def test_a_connection_to_the_child_is_used_again(daemon: Daemon) -> None:
    ids = [chat_when_idle(daemon, "plain")[2]["echo"]["connection"] for _ in range(4)]
    assert len(set(ids)) == 1


def test_after_a_stream_the_connection_to_the_child_is_used_again(daemon: Daemon) -> None:
    events = chat_when_idle(daemon, "plain", stream=True)[2]
    first = json.loads(events.split(b"\n\n")[0][6:])["echo"]["connection"]
    assert chat_when_idle(daemon, "plain")[2]["echo"]["connection"] == first


@pytest.mark.parametrize("model", ["one-shot", "three-shot", "closing"])
def test_a_kept_connection_gone_stale_is_replaced_unseen(daemon: Daemon, model: str) -> None:
    answers = [chat_when_idle(daemon, model) for _ in range(7)]
    assert [status for status, _, _ in answers] == [200] * 7
    posts = [row for row in daemon.events(model, "request") if row["method"] == "POST"]
    assert len(posts) == 7, "a request was sent to the child twice"
    per_connection = 3 if model == "three-shot" else 1
    connections = [answer["echo"]["connection"] for _, _, answer in answers]
    assert len(set(connections)) == -(-7 // per_connection)


def test_a_failure_on_a_fresh_connection_is_not_tried_again(daemon: Daemon) -> None:
    status, _, answer = daemon.chat("fresh", fake={"half_header": "close"})
    assert (status, answer["error"]["code"]) == (502, "upstream_failed")
    posts = [row for row in daemon.events("fresh", "request") if row["method"] == "POST"]
    assert len(posts) == 1


# --- back to the client


def test_the_first_chunk_arrives_before_the_second_exists(daemon: Daemon) -> None:
    connection, response = daemon.send(
        "POST", CHAT, {"model": "gated", "stream": True, "fake": {"stream_gate": 1}}
    )
    with contextlib.closing(connection), response:
        assert response.getheader("Content-Type") == "text/event-stream"
        first = b""
        while b" one" not in first:
            first += response.read1()
        assert b" two" not in first
        assert in_flight(daemon, "gated") == 1
        daemon.open_gate("gated", "stream_gate")
        assert words_of(first + response.read()) == " one two three four five"


def test_the_head_of_a_stream_arrives_before_its_first_event(daemon: Daemon) -> None:
    fake = {"stream_gate": 0}
    connection, response = daemon.send(
        "POST", CHAT, {"model": "frail", "stream": True, "fake": fake}
    )
    with contextlib.closing(connection), response:
        assert response.status == 200
        daemon.open_gate("frail", "stream_gate")
        assert words_of(response.read()) == " one two three four five"


@pytest.mark.parametrize("status", [400, 404, 429, 500, 501, 503])
def test_a_childs_refusal_is_passed_on_as_it_is(daemon: Daemon, status: int) -> None:
    text = '{"error": {"message": "n_ctx: 日本語", "code": 1}}  \n'
    fake = {
        "answer_status": status,
        "answer_body": text,
        "extra_headers": [["X-Of-Child", "a"], ["X-Of-Child", "b"], ["Retry-After", "17"]],
    }
    connection, response = daemon.send("POST", CHAT, {"model": "plain", "fake": fake})
    with contextlib.closing(connection), response:
        assert response.status == status
        assert response.headers.get_all("X-Of-Child") == ["a", "b"]
        assert response.getheader("Retry-After") == "17"
        assert response.getheader("Content-Type") == "application/json; charset=utf-8"
        assert response.read() == text.encode()


def test_headers_between_two_neighbours_are_not_passed_on(daemon: Daemon) -> None:
    extra = {
        "Connection": "X-Named",
        "X-Named": "by Connection",
        "Proxy-Authenticate": "Basic",
        "Trailer": "X-T",
        "Upgrade": "h2c",
        "Access-Control-Allow-Credentials": "true",
        "X-Kept": "yes",
    }
    _, headers, _ = daemon.chat("plain", fake={"extra_headers": extra})
    assert headers["x-kept"] == "yes"
    assert headers["connection"] == "keep-alive"
    dropped = {name.lower() for name in extra} - {"connection", "x-kept"} | {"keep-alive"}
    assert dropped & set(headers) == set()
    assert not [name for name in headers if name.startswith("access-control-")]


def test_an_answer_says_which_sidecar_gave_it(daemon: Daemon) -> None:
    _, first, _ = daemon.chat("plain", "-c 11")
    _, second, answer = daemon.chat("plain", "-c 11")
    row = next(row for row in daemon.sidecars() if row["pid"] == answer["echo"]["pid"])
    assert first["x-sidecar-hash"] == second["x-sidecar-hash"] == row["hash"]
    assert re.fullmatch(r"[0-9a-f]{12}", row["hash"])
    assert (first["x-sidecar-start"], second["x-sidecar-start"]) == ("started", "reused")
    assert int(first["x-sidecar-wait-ms"]) > 0
    assert second["x-sidecar-wait-ms"] == "0"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_with_the_connection_is_framed_anew(
    daemon: Daemon, stream: bool
) -> None:
    body = chat_body("plain", stream=stream, n=2, fake={"close_delimited": True})
    head, answer = answer_until_close(daemon, request_bytes(body, "Connection: close"))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nTransfer-Encoding: chunked" in head
    payload = dechunked(answer)
    if stream:
        assert words_of(payload) == " one two three four five"
    else:
        assert json.loads(payload)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("fake", [{}, {"close_delimited": True}, {"chunk_split": 5}])
def test_an_http_1_0_client_gets_a_stream_unchunked_and_the_close(
    daemon: Daemon, fake: dict[str, object]
) -> None:
    body = chat_body("plain", stream=True, fake=fake)
    head, payload = answer_until_close(
        daemon, request_bytes(body, "Connection: keep-alive", version="1.0")
    )
    assert b"transfer-encoding" not in head.lower()
    assert b"\r\nConnection: close" in head
    assert words_of(payload) == " one two three four five"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_split_over_chunks_arrive_whole(daemon: Daemon, size: int) -> None:
    fake = {"chunk_split": size, "words": SPLIT_WORDS, "chunks": 4}
    status, _, payload = daemon.chat("plain", stream=True, fake=fake)
    assert status == 200
    assert words_of(payload) == "".join(f" {word}" for word in SPLIT_WORDS)


def test_eight_streams_at_once_do_not_mix(daemon: Daemon) -> None:
    everybody_begun = threading.Barrier(9, timeout=20)

    def stream(number: int) -> str:
        fake = {"words": [f"w{number}"], "chunks": 50, "stream_gate": 1, "chunk_split": 64}
        connection, response = daemon.send(
            "POST", CHAT, {"model": "choir", "stream": True, "fake": fake}
        )
        with contextlib.closing(connection), response:
            first = response.read1()
            everybody_begun.wait()
            return words_of(first + response.read())

    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(stream, number) for number in range(8)]
        everybody_begun.wait()
        assert in_flight(daemon, "choir") == 8
        daemon.open_gate("choir", "stream_gate")
        assert [answer.result(20) for answer in answers] == [f" w{n}" * 50 for n in range(8)]


# --- clients that leave


LEAVING: dict[str, tuple[str, dict[str, object], str]] = {
    "in the middle of a stream": ("left-mid-stream", {"hang_mid_stream": 2}, "stream"),
    "in the silent prefill of a stream": ("left-in-prefill", {"answer_gate": True}, "prefill"),
    "waiting for a whole answer": ("left-waiting", {"answer_gate": True}, "prefill"),
    "while chunks come": ("left-while-streaming", {"chunks": 5000, "chunk_delay": 0.02}, "stream"),
}


@pytest.mark.parametrize(("model", "fake", "phase"), LEAVING.values(), ids=LEAVING.keys())
def test_the_child_is_told_within_a_second_that_its_client_left(
    daemon: Daemon, model: str, fake: dict[str, object], phase: str
) -> None:
    daemon.chat(model)  # loaded, so that the second is the relay's own
    daemon.idle_sidecars()
    is_stream = model != "left-waiting"
    with contextlib.closing(daemon.connect()) as sock:
        sock.sendall(request_bytes(chat_body(model, stream=is_stream, fake=fake)))
        if phase == "stream":
            read_until(sock, b" two")
        else:
            wait_until(lambda: len(posts_of(daemon, model)) == 2, "the child has the request")
        assert in_flight(daemon, model) == 1
        assert not daemon.events(model, "disconnect")
    events = wait_until(lambda: daemon.events(model, "disconnect"), "a disconnect", 1.0)
    assert [event["phase"] for event in events] == [phase]
    wait_until(lambda: in_flight(daemon, model) == 0, "the lease is released")
    assert daemon.chat(model)[1]["x-sidecar-start"] == "reused"


def posts_of(daemon: Daemon, model: str) -> list[dict[str, Any]]:
    return [row for row in daemon.events(model, "request") if row["method"] == "POST"]


# --- answers that break


@pytest.mark.parametrize(
    "fake",
    [
        {"die_mid_stream": 2},
        {"die_mid_stream": 2, "die_code": -9},
        {"close_mid_chunk": 2},
        {"bad_chunk": 2},
    ],
    ids=str,
)
def test_a_stream_that_breaks_is_cut_and_not_ended(daemon: Daemon, fake: dict[str, object]) -> None:
    (daemon.folder / "breaking.json.stream_gate").unlink(missing_ok=True)
    body = chat_body("breaking", stream=True, fake=fake | {"stream_gate": 2})
    with contextlib.closing(daemon.connect()) as sock:
        sock.sendall(request_bytes(body))
        begun = read_until(sock, b" two")
        assert begun.startswith(b"HTTP/1.1 200 ")
        daemon.open_gate("breaking", "stream_gate")
        answer = begun + read_all(sock)
    assert b" three" not in answer
    assert b"[DONE]" not in answer
    assert not answer.endswith(b"0\r\n\r\n")
    wait_until(lambda: in_flight(daemon, "breaking") == 0, "the lease is released")
    if "die_mid_stream" in fake:  # the next request is not to meet the dying one
        pid = daemon.starts("breaking")[-1]["pid"]
        wait_until(lambda: pid not in [row["pid"] for row in daemon.sidecars()], "its end is seen")


def test_an_answer_shorter_than_announced_is_cut(daemon: Daemon) -> None:
    body = chat_body("plain", n=2, fake={"truncate_body": 10})
    head, answer = answer_until_close(daemon, request_bytes(body))
    match = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
    assert match
    assert len(answer) == int(match[1]) - 10


def test_an_error_event_inside_a_stream_is_passed_on(daemon: Daemon) -> None:
    status, _, payload = daemon.chat("plain", stream=True, fake={"error_mid_stream": 2})
    assert status == 200
    assert events_of(payload)[-1]["error"]["message"] == "it broke"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fake",
    [
        {"half_header": "close"},
        {"garbage_answer": True},
        {"huge_header": 100_000},
        {"die_before_answer": True, "die_code": 3},
        {"die_before_answer": True, "die_code": -11},
        {"extra_headers": {"Bad Name": "x"}},
        {"extra_headers": {"Content-Length": "1"}},
        {"extra_headers": {"Transfer-Encoding": "gzip, chunked"}},
    ],
    ids=str,
)
def test_a_child_that_speaks_nonsense_is_a_502(
    daemon: Daemon, fake: dict[str, object], stream: bool
) -> None:
    status, _, answer = daemon.chat("frail", stream=stream, fake=fake)
    assert status == 502
    assert answer["error"]["code"] == "upstream_failed"
    assert answer["error"]["type"] == "server_error"
    if "die_before_answer" in fake:
        words = "exit code 3" if fake["die_code"] == 3 else killed_by(11)
        assert words in answer["error"]["message"]
    assert daemon.chat("frail")[0] == 200


def test_a_refused_answer_leaves_the_clients_connection_usable(daemon: Daemon) -> None:
    bad = request_bytes(chat_body("plain", fake={"garbage_answer": True}))
    good = request_bytes(chat_body("plain"), "Connection: close")
    with contextlib.closing(daemon.connect()) as sock:
        sock.sendall(bad)
        assert b"502 Bad Gateway" in read_until(sock, b"}}")
        sock.sendall(good)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")
