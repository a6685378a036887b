"""What clients are told: every error of the API, and the shape of its own answers."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import CHAT, Daemon, is_alive, running_daemon, wait_until

KEY = "correct-horse-battery"
MODELS: dict[str, dict[str, object]] = {
    "qwen-small": {},
    "qwen-large": {},
    "vanished": {},
    "never-started": {},
    "broken": {"exit_on_load": {"code": 3, "message": "error: no such tensor"}},
    "endless": {"never_ready": True},
    "shown": {},
    "deleted": {},
}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("errors")
    settings = {
        "MAX_SIDECARS": "8",
        "HEALTH_TIMEOUT_SECONDS": "1.5",
        "LLAMA_SIDECAR_MAX_BODY_MB": "1",
    }
    with running_daemon(folder, MODELS, **settings) as running:
        (folder / "vanished.json").unlink()
        yield running


def assert_error(
    got: tuple[int, dict[str, str], Any], status: int, code: str, param: str | None = None
) -> str:
    """That this is the OpenAI-shaped error; its message."""
    assert got[0] == status, got
    assert got[1]["content-type"] == "application/json"
    assert list(got[2]) == ["error"]
    error = got[2]["error"]
    message = error.pop("message")
    assert error == {"type": ERROR_TYPES[status], "code": code, "param": param}
    assert isinstance(message, str)
    assert message
    return message


JSON_TYPE = {"Content-Type": "application/json"}
NAMED = {"X-Model-Id": "never-started"}
REFUSED: list[tuple[bytes, dict[str, str], int, str, str | None, str]] = [
    (b"", {}, 400, "invalid_json", None, "no JSON"),
    (b"{", {}, 400, "invalid_json", None, "no JSON"),
    (b'{"model": "never-started"', {}, 400, "invalid_json", None, "no JSON"),
    (b'\xff{"model": "x"}', {}, 400, "invalid_json", None, "no JSON"),
    (b'{"a":' + b"[" * 200_000, {}, 400, "invalid_json", None, "nested too deeply"),
    (b"{}", {}, 400, "missing_model", "model", "X-Model-Id"),
    (b"[]", {}, 400, "invalid_json", None, "no JSON object"),
    (b"null", {}, 400, "invalid_json", None, "no JSON object"),
    (b'{"model": ""}', {}, 400, "missing_model", "model", "X-Model-Id"),
    (b'{"model": 7}', {}, 400, "missing_model", "model", "X-Model-Id"),
    (b'{"model": null}', {}, 400, "missing_model", "model", "X-Model-Id"),
    (b"{}", {"X-Model-Id": "\xff"}, 400, "missing_model", "X-Model-Id", "UTF-8"),
    (b'{"model": "qwen-smal"}', {}, 404, "model_not_found", "model", "qwen-small"),
    (b'{"model": "../../etc"}', {}, 404, "model_not_found", "model", "GET /v1/models"),
    (b'{"model": "vanished"}', {}, 404, "model_not_found", "model", "vanished.json is missing"),
    (b"{}", {"X-Model-Id": "nobody"}, 404, "model_not_found", "model", "'nobody'"),
    (b"{}", NAMED | {"X-Agent-Flags": "--port 1"}, 400, "invalid_flags", "X-Agent-Flags", "--port"),
    (b"{}", NAMED | {"X-Agent-Flags": "-c"}, 400, "invalid_flags", "X-Agent-Flags", "-c"),
    (b"{}", NAMED | {"X-Agent-Flags": "'"}, 400, "invalid_flags", "X-Agent-Flags", "quot"),
    (b"{}", NAMED | {"X-Agent-Flags": "--tpo-k 3"}, 400, "invalid_flags", "X-Agent-Flags", "top-k"),
    (b"{}", NAMED | {"X-Agent-Flags": "\xff"}, 400, "invalid_flags", "X-Agent-Flags", "UTF-8"),
]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "param", "words"),
    REFUSED,
    ids=[f"{code}-{index}" for index, (_, _, _, code, _, _) in enumerate(REFUSED)],
)
def test_a_request_that_makes_no_sense_is_refused_and_starts_nothing(
    daemon: Daemon,
    body: bytes,
    headers: dict[str, str],
    status: int,
    code: str,
    param: str | None,
    words: str,
) -> None:
    before = {row["pid"] for row in daemon.sidecars()}
    got = daemon.ask("POST", CHAT, body, JSON_TYPE | headers)
    assert words in assert_error(got, status, code, param)
    assert "retry-after" not in got[1]
    assert got[1]["connection"] == "keep-alive"
    assert {row["pid"] for row in daemon.sidecars()} <= before
    assert not daemon.starts("never-started")


def test_every_fault_of_the_flags_is_named_at_once(daemon: Daemon) -> None:
    got = daemon.chat("never-started", "--port 1 --host 0.0.0.0 --nonsense")
    message = assert_error(got, 400, "invalid_flags", "X-Agent-Flags")
    for word in ("--port", "--host", "--nonsense"):
        assert word in message


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/", 404, "not_found", None),
        ("GET", "/v1", 404, "not_found", None),
        ("POST", "/v1/load", 404, "not_found", None),
        ("GET", "/health/", 404, "not_found", None),
        ("GET", CHAT, 405, "method_not_allowed", "POST, OPTIONS"),
        ("POST", "/health", 405, "method_not_allowed", "GET, HEAD, OPTIONS"),
        ("DELETE", "/sidecars", 405, "method_not_allowed", "GET, HEAD, OPTIONS"),
        ("GET", "/sidecars/0123456789ab", 405, "method_not_allowed", "DELETE, OPTIONS"),
        ("DELETE", "/sidecars/0123456789ab", 404, "sidecar_not_found", None),
        ("DELETE", "/sidecars/", 404, "sidecar_not_found", None),
    ],
)
def test_a_wrong_path_or_method_is_refused(
    daemon: Daemon, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    got = daemon.ask(method, path)
    assert_error(got, status, code)
    assert got[1].get("allow") == allow


def test_plain_text_is_not_taken_for_json(daemon: Daemon) -> None:
    got = daemon.ask("POST", CHAT, b'{"model": "qwen-small"}', {"Content-Type": "text/plain"})
    assert_error(got, 415, "unsupported_media_type")


def raw_error(daemon: Daemon, request: bytes) -> tuple[int, dict[str, str], Any]:
    """The one answer to bytes on a connection that the daemon then closes."""
    with contextlib.closing(daemon.connect()) as sock:
        sock.sendall(request)
        pieces = []
        while data := sock.recv(65536):
            pieces.append(data)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    start, *lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return int(start.split()[1]), fields, json.loads(body)


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 1048577\r\n\r\n",
        b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n",
        b"Content-Length: 999999999999999999\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n100001\r\n" + b"x" * 0x100001,
    ],
    ids=["announced", "expecting 100", "absurd", "chunked"],
)
def test_a_body_too_large_is_refused_before_it_is_all_there(daemon: Daemon, rest: bytes) -> None:
    got = raw_error(daemon, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode() + rest)
    assert "1048576" in assert_error(got, 413, "request_too_large")
    assert got[1]["connection"] == "close"


def test_a_body_of_just_the_limit_is_taken(daemon: Daemon) -> None:
    body = json.dumps({"model": "qwen-small", "pad": ""}).encode()
    body = body.replace(b'""', b'"' + b"p" * (1048576 - len(body)) + b'"')
    assert len(body) == 1048576
    assert daemon.ask("POST", CHAT, body)[0] == 200


def test_a_child_that_ends_while_loading_is_a_502_with_its_last_words(daemon: Daemon) -> None:
    message = assert_error(daemon.chat("broken"), 502, "model_load_failed")
    assert "exit code 3" in message
    assert "error: no such tensor" in message
    again = daemon.chat("broken")
    assert assert_error(again, 502, "model_load_failed") == message
    assert 1 <= int(again[1]["retry-after"]) <= 2
    assert len(daemon.starts("broken")) == 1


def test_a_child_that_is_never_ready_is_a_504(daemon: Daemon) -> None:
    assert "not ready after" in assert_error(daemon.chat("endless"), 504, "load_timeout")
    pid = daemon.starts("endless")[0]["pid"]
    wait_until(lambda: not is_alive(pid), "the child is ended")


def test_a_child_that_dies_before_it_answers_is_a_502(daemon: Daemon) -> None:
    got = daemon.chat("qwen-large", fake={"die_before_answer": True, "die_code": 9})
    assert "exit code 9" in assert_error(got, 502, "upstream_failed")
    assert daemon.chat("qwen-large")[1]["x-sidecar-start"] == "started"


def test_a_full_pool_answers_busy_and_a_full_queue_answers_429(tmp_path: Path) -> None:
    models = {"holder": {"answer_gate": True}, "waiter": {}, "third": {}}
    settings = {
        "MAX_SIDECARS": "1",
        "LLAMA_SIDECAR_QUEUE_SIZE": "1",
        "LLAMA_SIDECAR_QUEUE_SECONDS": "1.5",
    }
    with running_daemon(tmp_path, models, **settings) as daemon, ThreadPoolExecutor(2) as threads:
        held = threads.submit(daemon.chat, "holder")
        wait_until(lambda: any(row["in_flight"] for row in daemon.sidecars()), "it is held")
        waiting = threads.submit(daemon.chat, "waiter")
        wait_until(lambda: daemon.ask("GET", "/health")[2]["queue"]["waiting"] == 1, "one waits")
        full = daemon.chat("third")
        busy = waiting.result(20)
        daemon.open_gate("holder", "answer_gate")
        assert held.result(20)[0] == 200
        assert "queue holds 1" in assert_error(full, 429, "queue_full")
        assert "MAX_SIDECARS" in assert_error(busy, 503, "pool_busy")
        assert int(full[1]["retry-after"]) >= 1
        assert int(busy[1]["retry-after"]) >= 1
        assert not daemon.starts("waiter")
        assert not daemon.starts("third")


def test_a_load_longer_than_the_queues_time_is_a_504_and_goes_on(tmp_path: Path) -> None:
    models = {"slow": {"load_gate": True}}
    with running_daemon(tmp_path, models, LLAMA_SIDECAR_QUEUE_SECONDS="0.5") as daemon:
        got = daemon.chat("slow")
        assert "still loading" in assert_error(got, 504, "load_timeout")
        assert int(got[1]["retry-after"]) >= 1
        daemon.open_gate("slow", "load_gate")
        wait_until(lambda: daemon.sidecars()[0]["state"] == "ready", "the load goes on")
        assert len(daemon.starts("slow")) == 1


def test_while_it_drains_new_work_is_refused_and_health_says_so(tmp_path: Path) -> None:
    models: dict[str, dict[str, object]] = {"held": {"answer_gate": True}}
    with running_daemon(tmp_path, models) as daemon, ThreadPoolExecutor(1) as threads:
        held = threads.submit(daemon.chat, "held")
        wait_until(lambda: any(row["in_flight"] for row in daemon.sidecars()), "it is held")
        daemon.send_signal(signal.SIGTERM)
        wait_until(lambda: daemon.ask("GET", "/health")[0] == 503, "it drains")
        health = daemon.ask("GET", "/health")[2]
        refused = daemon.chat("held")
        daemon.open_gate("held", "answer_gate")
        assert held.result(20)[0] == 200
        assert daemon.process.wait(20) == 0
    assert health["status"] == "draining"
    assert_error(refused, 503, "shutting_down")
    assert int(refused[1]["retry-after"]) >= 1


# --- the daemon's own answers


def test_health_says_how_it_is(daemon: Daemon) -> None:
    daemon.chat("shown")
    status, headers, body = daemon.ask("GET", "/health")
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert set(body) == {"status", "version", "uptime_seconds", "sidecars", "queue"}
    assert body["status"] == "ok"
    assert re.fullmatch(r"\d+\.\d+\.\d+", body["version"])
    assert body["uptime_seconds"] > 0
    assert set(body["sidecars"]) == {"ready", "starting", "stopping", "max"}
    assert body["sidecars"]["max"] == 8
    assert body["sidecars"]["ready"] >= 1
    assert body["queue"] == {"waiting": 0}


def moment(text: str) -> datetime.datetime:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    return datetime.datetime.fromisoformat(text)


def test_sidecars_lists_each_child_most_recently_used_first(daemon: Daemon) -> None:
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(milliseconds=2)
    daemon.chat("qwen-small")
    daemon.idle_sidecars()  # so that its use has ended before the next one begins
    daemon.chat("shown", "-c 3")
    daemon.chat("shown", "-c 3")
    rows = daemon.idle_sidecars()
    row = rows[0]
    assert set(row) == set(
        "hash model_id model_path args state port pid in_flight requests_total created_at "
        "ready_at last_used_at load_seconds restarts".split()
    )
    start = daemon.starts("shown")[-1]
    assert (row["pid"], row["port"]) == (start["pid"], start["port"])
    assert row["model_id"] == "shown"
    assert row["model_path"] == str(daemon.folder / "shown.json")
    assert row["args"] == ["--ctx-size", "3"]
    assert (row["state"], row["in_flight"], row["requests_total"]) == ("ready", 0, 2)
    assert row["restarts"] == 0
    assert row["load_seconds"] > 0
    created, ready, used = (moment(row[f"{name}_at"]) for name in ("created", "ready", "last_used"))
    assert before <= created < ready <= used
    assert rows[1]["model_id"] == "qwen-small"


def test_a_deleted_sidecar_is_gone_when_the_answer_comes(daemon: Daemon) -> None:
    hash_ = daemon.chat("deleted")[1]["x-sidecar-hash"]
    pid = daemon.starts("deleted")[0]["pid"]
    status, _, body = daemon.ask("DELETE", f"/sidecars/{hash_}")
    assert (status, body) == (200, {"hash": hash_, "deleted": True})
    assert not is_alive(pid)
    assert_error(daemon.ask("DELETE", f"/sidecars/{hash_}"), 404, "sidecar_not_found")


def test_models_is_the_map_in_openai_shape(daemon: Daemon) -> None:
    daemon.chat("shown")
    status, _, body = daemon.ask("GET", "/v1/models")
    assert status == 200
    assert set(body) == {"object", "data"}
    assert body["object"] == "list"
    assert [row["id"] for row in body["data"]] == list(MODELS)
    rows = {row.pop("id"): row for row in body["data"]}
    common = {"object": "model", "created": 0, "owned_by": "llama-sidecar", "aliases": []}
    assert rows["shown"] == common | {"loaded": True}
    assert rows["never-started"] == common | {"loaded": False}


def test_head_is_get_without_the_body(daemon: Daemon) -> None:
    _, got, body = daemon.ask("GET", "/v1/models")
    status, head, nothing = daemon.ask("HEAD", "/v1/models")
    assert status == 200
    assert nothing == b""
    assert head["content-type"] == got["content-type"]
    assert head["content-length"] == str(len(json.dumps(body)))


# --- the key, and who may ask


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("locked")
    with running_daemon(folder, {"plain": {}}, LLAMA_SIDECAR_API_KEY=KEY) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": "Bearer \xff"},
        {"X-Api-Key": "wrong"},
        {"X-Api-Key": ""},
        {"X-Api-Key": f"Bearer {KEY}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [("POST", CHAT), ("GET", "/sidecars"), ("GET", "/v1/models")])
def test_without_the_key_nothing_is_done(
    locked: Daemon, call: tuple[str, str], headers: dict[str, str]
) -> None:
    body = {"model": "plain", "fake": {}} if call[0] == "POST" else None
    got = locked.ask(*call, body, headers)
    assert_error(got, 401, "invalid_api_key")
    assert got[1]["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}, {"X-Api-Key": KEY}],
    ids=str,
)
def test_with_the_key_everything_is_served(locked: Daemon, headers: dict[str, str]) -> None:
    assert locked.ask("GET", "/sidecars", None, headers)[0] == 200
    status, _, answer = locked.ask("POST", CHAT, {"model": "plain"}, headers)
    assert status == 200
    assert KEY not in json.dumps(answer["echo"])
    assert KEY not in json.dumps(locked.starts("plain"))


def test_health_is_open_to_whoever_asks(locked: Daemon) -> None:
    assert locked.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "host_not_allowed"),
        ({"Host": "127.0.0.1.evil.example"}, "host_not_allowed"),
        ({"Origin": "https://evil.example"}, "origin_not_allowed"),
        ({"Origin": "null"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed"),
    ],
    ids=str,
)
def test_other_names_and_other_web_pages_are_refused(
    daemon: Daemon, headers: dict[str, str], code: str
) -> None:
    got = daemon.ask("POST", CHAT, {"model": "never-started"}, headers)
    assert got[0] == 403
    assert got[2]["error"]["code"] == code
    assert got[2]["error"]["type"] == "permission_error"
    assert not daemon.starts("never-started")
