"""Make room on a machine before it is measured, and put back what was there.

Two programs may hold the GPU: llama-sidecar and llama-swap. Both are asked over their HTTP
APIs, on the machine itself, so that nothing of them has to listen to a network:

    llama-sidecar   GET /sidecars, DELETE /sidecars/{hash}; a model comes back by a request of
                    one token with the flags it had
    llama-swap      GET /running, GET /unload; a model comes back by GET /upstream/{model}/health

What was unloaded is a list of plain values, so that it can be written down before anything is
unloaded, and put back by another process, even after a crash.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

ASK_S = 20.0
BUSY_S = 600.0  # how long requests that are being answered may take to end
BUSY_POLL_S = 2.0
LOAD_S = 600.0

Loaded = dict[str, Any]  # {"by": "llama-sidecar" | "llama-swap", "url", "model", "flags", "back"}


class RoomError(Exception):
    """In words: somebody holds the machine, and could not be asked to let go."""


def loaded(sidecar: str, swap: str) -> list[Loaded]:
    """What both programs hold now. An empty address, or where nobody listens, holds nothing.

    Raises RoomError where somebody listens who answers otherwise.
    """
    return _of_sidecar(sidecar) + _of_swap(swap)


def _of_sidecar(url: str) -> list[Loaded]:
    answer = _asked(url, "/sidecars")
    if answer is None:
        return []
    try:
        return [
            {
                "by": "llama-sidecar",
                "url": url,
                "model": row["model_id"],
                "hash": row["hash"],
                "flags": list(row["args"]),
                "in_flight": int(row["in_flight"]),
                "back": False,
            }
            for row in answer["sidecars"]
        ]
    except (KeyError, TypeError) as exc:
        raise RoomError(f"{url} is no llama-sidecar: its /sidecars lacks {exc}") from None


def _of_swap(url: str) -> list[Loaded]:
    answer = _asked(url, "/running")
    if answer is None:
        return []
    try:
        return [
            {"by": "llama-swap", "url": url, "model": row["model"], "back": False}
            for row in answer["running"] or []
        ]
    except (KeyError, TypeError) as exc:
        raise RoomError(f"{url} is no llama-swap: its /running lacks {exc}") from None


def make(sidecar: str, swap: str, say: Callable[[str], None], busy_s: float = BUSY_S) -> None:
    """Have all of it unloaded; requests under way are waited for. Raises RoomError."""
    deadline = time.monotonic() + busy_s
    while busy := [one for one in _of_sidecar(sidecar) if one["in_flight"]]:
        if time.monotonic() > deadline:
            raise RoomError(f"{busy[0]['model']} has been answering for {busy_s:g} s: {sidecar}")
        say(f"waiting for {busy[0]['model']} to answer")
        time.sleep(BUSY_POLL_S)
    for one in _of_sidecar(sidecar):
        say(f"asking llama-sidecar to unload {one['model']}")
        _expect(sidecar, "DELETE", f"/sidecars/{one['hash']}", (200, 404))
    if _of_swap(swap):
        say("asking llama-swap to unload")
        _expect(swap, "GET", "/unload", (200,))
    if left := loaded(sidecar, swap):
        raise RoomError(f"{left[0]['model']} was loaded again at once: stop who asks for it")


def put_back(unloaded: Sequence[Loaded], say: Callable[[str], None]) -> list[str]:
    """Have them loaded again and mark each that is; what could not be, in words.

    Blocks for up to LOAD_S for each.
    """
    faults = []
    for one in unloaded:
        if one["back"]:
            continue
        say(f"loading {one['model']} again")
        try:
            (_load_sidecar if one["by"] == "llama-sidecar" else _load_swap)(one)
            one["back"] = True
        except (RoomError, OSError, HTTPException, ValueError) as exc:
            faults.append(f"{one['by']} has not loaded {one['model']} again: {exc}")
    return faults


def _load_sidecar(one: Loaded) -> None:
    """Its whole list of flags gives the same process; with flags that only an operator may
    say it is refused, and then the model's own have to do."""
    body = json.dumps({"model": one["model"], "prompt": "", "max_tokens": 1, "n_predict": 1})
    headers = {"Content-Type": "application/json", "X-Agent-Flags": shlex.join(one["flags"])}
    status, said = _send(one["url"], "POST", "/v1/completions", body, headers, LOAD_S)
    if status == 400:
        del headers["X-Agent-Flags"]
        status, said = _send(one["url"], "POST", "/v1/completions", body, headers, LOAD_S)
    if status != 200:
        raise RoomError(f"{status} {said[:200]!r}")


def _load_swap(one: Loaded) -> None:
    path = f"/upstream/{quote(one['model'], safe='/')}/health"
    status, said = _send(one["url"], "GET", path, None, {}, LOAD_S)
    if status != 200:
        raise RoomError(f"{status} {said[:200]!r}")


def _asked(url: str, path: str) -> Any:
    """The JSON there; None if nobody listens. Raises RoomError."""
    if not url:
        return None
    try:
        status, text = _send(url, "GET", path, None, {}, ASK_S)
    except ConnectionRefusedError:
        return None
    except (OSError, HTTPException) as exc:
        raise RoomError(f"{url} does not answer: {exc}") from exc
    if status == 404:
        return None  # somebody else's port
    if status != 200:
        advice = "unload its models yourself, and give '' for its address"
        raise RoomError(f"{url}{path} answers {status}: {text[:200]!r}; {advice}")
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return None


def _expect(url: str, method: str, path: str, wanted: Sequence[int]) -> None:
    try:
        status, text = _send(url, method, path, None, {}, LOAD_S)
    except (OSError, HTTPException) as exc:
        raise RoomError(f"{method} {url}{path}: {exc}") from exc
    if status not in wanted:
        raise RoomError(f"{method} {url}{path} answers {status}: {text[:200]!r}")


def _send(
    url: str, method: str, path: str, body: str | None, headers: dict[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Raises OSError or HTTPException."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
