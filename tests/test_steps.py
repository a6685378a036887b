"""An agent between two steps: answers that end in tool calls, and what they spare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pool import Sidecar, State
from tests.daemon import CHAT, Daemon, running_daemon, wait_until
from tests.test_pool import Bench, bench_in

CALLS = [["look", '{"at": 1}']]
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TRICK = '{"finish_reason":"tool_calls","stop_reason": "tool_use","type":"function_call"}'


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


# --- what counts as a step


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One place, and an agent's sidecar is spared for longer than any test lasts."""
    env = {
        "MAX_SIDECARS": "1",
        "LLAMA_SIDECAR_STEP_SECONDS": "600",
        "LLAMA_SIDECAR_FAIR_SECONDS": "600",
    }
    folder = tmp_path_factory.mktemp("steps")
    with running_daemon(folder, {"agent": {}, "other": {}}, **env) as running:
        yield running


def is_spared(daemon: Daemon, threads: ThreadPoolExecutor) -> bool:
    """Whether a request for another model leaves the agent's sidecar alone."""
    (agent,) = daemon.idle_sidecars()
    other = threads.submit(daemon.chat, "other")
    wait_until(
        lambda: other.done() or daemon.ask("GET", "/health")[2]["queue"]["waiting"], "it waits"
    )
    rows = [row for row in daemon.sidecars() if row["hash"] == agent["hash"]]
    found = [row["state"] for row in rows] == ["ready"]
    if found:
        daemon.ask("DELETE", f"/sidecars/{agent['hash']}")
    assert other.result(20)[0] == 200
    return found


@pytest.mark.parametrize("is_compact", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_an_answer_that_ends_in_tool_calls_is_a_step(
    daemon: Daemon, threads: ThreadPoolExecutor, path: str, stream: bool, is_compact: bool
) -> None:
    body = {"model": "agent", "stream": stream}
    fake: dict[str, object] = {"tool_calls": CALLS, "compact": is_compact}
    assert daemon.ask("POST", path, body | {"fake": fake})[0] == 200
    assert is_spared(daemon, threads)


@pytest.mark.parametrize("chunk_split", [1, 3, 20, 29])
def test_a_step_is_seen_wherever_its_stream_is_split(
    daemon: Daemon, threads: ThreadPoolExecutor, chunk_split: int
) -> None:
    fake = {"tool_calls": CALLS, "chunk_split": chunk_split}
    assert daemon.chat("agent", stream=True, fake=fake)[0] == 200
    assert is_spared(daemon, threads)


@pytest.mark.parametrize(
    "whole",
    [
        {"choices": [{"finish_reason": "tool_calls", "message": {}}]},
        {"content": [], "stop_reason": "tool_use"},
        {"output": [{"type": "function_call", "name": "look"}]},
    ],
    ids=str,
)
def test_a_whole_answer_with_tool_calls_is_a_step(
    daemon: Daemon, threads: ThreadPoolExecutor, whole: object
) -> None:
    fake = {"answer_status": 200, "answer_body": whole}
    assert daemon.chat("agent", stop="x", fake=fake)[0] == 200
    assert is_spared(daemon, threads)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": True},
        {"fake": {"words": [TRICK]}},
        {"stream": True, "fake": {"words": [TRICK]}},
        {"stream": True, "fake": {"words": [TRICK], "compact": True, "chunk_split": 5}},
        {"stream": True, "fake": {"words": [json.dumps(TRICK)]}},
        {"fake": {"answer_status": 400, "answer_body": {"error": {"type": "tool_calls"}}}},
    ],
    ids=str,
)
def test_text_that_only_speaks_of_tool_calls_is_no_step(
    daemon: Daemon, threads: ThreadPoolExecutor, fields: dict[str, object]
) -> None:
    assert daemon.ask("POST", CHAT, {"model": "agent", **fields})[0] in (200, 400)
    assert not is_spared(daemon, threads)


# --- what a step spares


def step(bench: Bench, name: str, *, goes_on: bool = True) -> Sidecar:
    with bench.lease(name) as lease:
        lease.ended_in_tool_calls = goes_on
        return lease.sidecar


def test_an_agent_between_steps_is_spared_until_its_time_is_over(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=1, step_s=0.8, fair_wait_s=60.0) as bench:
        agent = step(bench, "agent")
        with bench.lease("other") as lease:
            assert lease.start_kind == "evicted"
            (start,) = bench.lines("other", "starts")
            assert isinstance(start["t"], float)
            assert start["t"] >= agent.step_until


def test_an_agent_that_comes_back_in_time_finds_its_sidecar(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path, max_sidecars=1, step_s=60.0, fair_wait_s=60.0) as bench:
        step(bench, "agent")
        other = threads.submit(bench.use, "other")
        wait_until(lambda: bench.pool.counts()[1] == 1, "the other waits")
        with bench.lease("agent") as lease:
            assert lease.start_kind == "reused"
        assert other.result(20).spec.model_id == "other"  # its last answer was no step
        assert bench.alive() == {"other"}


def test_a_step_is_spared_no_longer_than_is_fair_to_who_waits(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=1, step_s=600.0, fair_wait_s=0.8) as bench:
        step(bench, "agent")
        with bench.lease("other") as lease:
            assert lease.start_kind == "evicted"
            assert lease.wait_s > 0.7


def test_who_has_waited_its_fair_time_already_evicts_at_the_end_of_the_answer(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with bench_in(tmp_path, max_sidecars=1, step_s=600.0, fair_wait_s=0.3) as bench:
        with bench.lease("agent") as agent:
            other = threads.submit(bench.use, "other")
            wait_until(lambda: agent.sidecar.is_draining, "its fair time is over")
            agent.ended_in_tool_calls = True
        assert agent.sidecar.state is not State.READY
        assert other.result(20).spec.model_id == "other"


@pytest.mark.parametrize(("step_s", "kept"), [(60.0, "agent"), (0.0, "later")])
def test_of_several_an_agent_between_steps_is_the_last_choice(
    tmp_path: Path, step_s: float, kept: str
) -> None:
    with bench_in(tmp_path, max_sidecars=2, step_s=step_s) as bench:
        step(bench, "agent")
        bench.use("later")
        with bench.lease("new") as lease:
            assert lease.wait_s < 15
        assert bench.alive() == {kept, "new"}


def test_without_a_step_time_an_agent_is_evicted_at_once(tmp_path: Path) -> None:
    with bench_in(tmp_path, max_sidecars=1, step_s=0.0, fair_wait_s=600.0) as bench:
        step(bench, "agent")
        assert bench.lease("other").start_kind == "evicted"
